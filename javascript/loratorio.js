// The panel: what the header says while it is closed, and, whenever prompt or options change, a look at what will be
// composed. Typing that names no LoRA asks the server nothing.

const LORATORIO_TABS = ["txt2img", "img2img"];
const LORATORIO_PAUSE = 400; // milliseconds without a change before the server is asked

function loratorioTags(tab) {
    const prompt = gradioApp().querySelector(`#${tab}_prompt textarea`);
    return prompt ? prompt.value.match(/<(lora|lyco):[^>]+>/g) || [] : [];
}

function loratorioTokens(selector) {
    return [...gradioApp().querySelectorAll(`${selector} .token`)].map((token) => token.textContent.trim());
}

// LoRAs may come from elsewhere than the prompt.
function loratorioHasOthers(tab) {
    return loratorioTokens(`:is(#loratorio_${tab}_pool, #${tab}_styles)`).length > 0;
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
    const text = (ticked && !loratorioHasOthers(tab) && hints[count]) || "";
    if (badge.textContent !== text) badge.textContent = text;
}

// All that the server's answer depends on, as text.
function loratorioState(tab) {
    const panel = gradioApp().querySelector(`#loratorio_${tab}`);
    if (!panel) return "";
    const inputs = [...panel.querySelectorAll("input, textarea, select")].filter((input) => !input.closest("[id$=_add]"));
    const values = inputs.map((input) => (/checkbox|radio/.test(input.type) ? input.checked : input.value));
    const tokens = [`#loratorio_${tab}`, `#${tab}_styles`].map(loratorioTokens);
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
        if (input && input.title !== text) input.title = text;
    }
    // A slider's number has no label of its own.
    for (const number of gradioApp().querySelectorAll(`#loratorio_${tab} input[type=number]:not([aria-label])`)) {
        const block = number.closest(`[id^=loratorio_${tab}_]`);
        const label = block?.querySelector("[data-testid=block-info]")?.textContent.trim();
        if (label) number.setAttribute("aria-label", label);
    }
    // gradio 3's headers are no buttons.
    const header = gradioApp().querySelector(`#loratorio_${tab}_advanced > .label-wrap`);
    if (header && header.tagName !== "BUTTON") {
        if (header.tabIndex !== 0) {
            header.tabIndex = 0;
            header.setAttribute("role", "button");
            header.addEventListener("keydown", (event) => {
                if (event.key !== "Enter" && event.key !== " ") return;
                event.preventDefault();
                header.click();
            });
        }
        const open = String(header.classList.contains("open"));
        if (header.getAttribute("aria-expanded") !== open) header.setAttribute("aria-expanded", open);
    }
    for (const [id, name, words] of [
        [`loratorio_${tab}_found`, "aria-live", "polite"],
        [`loratorio_${tab}-visible-checkbox`, "aria-label", "LoRAtorio on or off"],
    ]) {
        const element = gradioApp().querySelector(`#${id}`);
        if (element && element.getAttribute(name) !== words) element.setAttribute(name, words);
    }
}

onUiLoaded(() => {
    for (const tab of LORATORIO_TABS) {
        loratorioDescribe(tab);
        for (const event of ["input", "change"]) gradioApp().addEventListener(event, () => loratorioLook(tab));
        loratorioLook(tab);
    }
});
onAfterUiUpdate(() => {
    for (const tab of LORATORIO_TABS) {
        loratorioDescribe(tab);
        loratorioLook(tab);
    }
});
