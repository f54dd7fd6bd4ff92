// On the accordion's header: how many LoRAs the prompt names, while that is too few to compose and there is no pool.

function loratorioCountLoras(tab) {
    const prompt = gradioApp().querySelector(`#${tab}_prompt textarea`);
    return prompt ? new Set([...prompt.value.matchAll(/<lora:([^:>]+)/g)].map((match) => match[1])).size : 0;
}

function loratorioHasPool(tab) {
    return gradioApp().querySelector(`#loratorio_${tab}_pool .token`) !== null;
}

function loratorioUpdateBadge(tab) {
    const accordion = gradioApp().querySelector(`#loratorio_${tab}`);
    const ticked = gradioApp().querySelector(`#loratorio_${tab}-checkbox input`)?.checked;
    const label = accordion?.querySelector(".label-wrap");
    if (!label) return;

    let badge = label.querySelector(".loratorio-badge");
    if (!badge) {
        badge = document.createElement("small");
        badge.className = "loratorio-badge";
        badge.style.marginLeft = "1em";
        label.insertBefore(badge, label.lastElementChild);
    }
    const count = loratorioCountLoras(tab);
    const hints = ["no LoRA in the prompt: nothing to compose", "one LoRA in the prompt: only guidance is re-centred"];
    const text = (ticked && !loratorioHasPool(tab) && hints[count]) || "";
    if (badge.textContent !== text) badge.textContent = text;
}

onUiLoaded(() => {
    for (const tab of ["txt2img", "img2img"]) {
        gradioApp().addEventListener("input", () => loratorioUpdateBadge(tab));
        loratorioUpdateBadge(tab);
    }
});
onAfterUiUpdate(() => ["txt2img", "img2img"].forEach(loratorioUpdateBadge));
