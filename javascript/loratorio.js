// The panel: what the header says while it is closed, and, whenever prompt or options change, a look at what will be
// composed. Typing that names no LoRA asks the server nothing.

const LORATORIO_TABS = ["txt2img", "img2img"];
const LORATORIO_PAUSE = 400; // milliseconds without a change before the server is asked

function loratorioTags(tab) {
    const prompt = gradioApp().querySelector(`#${tab}_prompt textarea`);
    return prompt ? prompt.value.match(/<(lora|lyco):[^>]+>/g) || [] : [];
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
        label.insertBefore(badge, label.lastElementChild);
    }
    const count = new Set(loratorioTags(tab).map((tag) => tag.split(":")[1].replace(">", ""))).size;
    const hints = ["no LoRA in the prompt: nothing to compose", "one LoRA in the prompt: only guidance is re-centred"];
    const text = (ticked && !loratorioHasPool(tab) && hints[count]) || "";
    if (badge.textContent !== text) badge.textContent = text;
}

// All that the server's answer depends on, as text.
function loratorioState(tab) {
    const panel = gradioApp().querySelector(`#loratorio_${tab}`);
    if (!panel) return "";
    const inputs = [...panel.querySelectorAll("input, textarea, select")].filter((input) => !input.closest("[id$=_add]"));
    const values = inputs.map((input) => (/checkbox|radio/.test(input.type) ? input.checked : input.value));
    const tokens = [...panel.querySelectorAll(".token")].map((token) => token.textContent.trim());
    return JSON.stringify([loratorioTags(tab), values, tokens]);
}

const loratorioSeen = {};
const loratorioTimers = {};

function loratorioLook(tab) {
    loratorioUpdateBadge(tab);
    const ticked = gradioApp().querySelector(`#loratorio_${tab}-checkbox input`)?.checked;
    if (!ticked || loratorioState(tab) === loratorioSeen[tab]) return;
    clearTimeout(loratorioTimers[tab]);
    loratorioTimers[tab] = setTimeout(() => {
        loratorioSeen[tab] = loratorioState(tab);
        gradioApp().querySelector(`#loratorio_${tab}_look`)?.click();
    }, LORATORIO_PAUSE);
}

// The whole help of each option on hover, and words for what only shows.
function loratorioDescribe(tab) {
    const helps = gradioApp().querySelector(`#loratorio_${tab} .loratorio-helps`);
    for (const [id, text] of Object.entries(JSON.parse(helps?.dataset.helps || "{}"))) {
        const input = gradioApp().querySelector(`#${id}`);
        if (input) input.title = text;
    }
    gradioApp().querySelector(`#loratorio_${tab}_loras`)?.setAttribute("aria-live", "polite");
    gradioApp().querySelector(`#loratorio_${tab}-visible-checkbox`)?.setAttribute("aria-label", "LoRAtorio on or off");
}

onUiLoaded(() => {
    for (const tab of LORATORIO_TABS) {
        loratorioDescribe(tab);
        for (const event of ["input", "change"]) gradioApp().addEventListener(event, () => loratorioLook(tab));
        loratorioLook(tab);
    }
});
onAfterUiUpdate(() => LORATORIO_TABS.forEach(loratorioLook));
