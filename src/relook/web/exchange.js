// One question with its answers: what each looked at, what it said, what it cost.

import { asCurl, asPython } from "./api.js";
import { el, named, nests, overlay, still } from "./stage.js";

const TITLES = {
  auto: "Model decides", none: "No second look", region: "A region, cropped", clip: "The whole image, encoded again",
  detection: "The image through DINOv2", seg: "The image through SAM",
};
export const title = (look) => TITLES[look] ?? look;

export const describe = (look, size) => (look.kind === "region"
  ? `Looked closer at ${look.cells ? named(look.cells) : "a region"}${nests(look, size) ? " of what it saw before" : ""}`
  : `Looked at the whole image again (${look.kind})${look.map ? "; the brighter, the more it weighed" : ""}`);

// Under the image: what the marks on it mean.
export function legend(looks) {
  const seen = looks.filter((look) => !look.problem);
  const wider = seen.some(({ kind, cells, box }) => kind === "region" && cells && box);
  return [wider && "Solid: what it saw. Dashed: the cells it named.",
    seen.some((look) => look.map) && "The brighter, the more it weighed."].filter(Boolean).join(" ");
}

const seconds = (ms) => `${(ms / 1000).toFixed(ms < 9950 ? 2 : 1)} s`;
const count = (number) => number.toLocaleString("en");
const STAGES = { vision: "image encoder", prefill: "reading", decode: "writing", look: "second look" };
const COSTS = {
  lm_positions: "token positions through the language model", sequence_length: "tokens in the conversation",
  vision_patches: "image patches encoded", generated_tokens: "tokens written", cached_tokens: "tokens reused from before",
};

// One answer. Holds the state of its request too: `text`, `looks`, `result`, `state` running | done | stopped | failed.
export class Run {
  constructor({ look, region }, context) {
    Object.assign(this, { look, region, context, text: "", looks: [], result: null, state: "running", problem: null });
    this.begun = performance.now();
    this.said = el("p", { class: "before soft", hidden: true });
    this.seen = el("div", { class: "looks" });
    this.answer = el("p", { class: "answer waiting" });
    this.note = el("p", { class: "problem", hidden: true });
    this.cost = el("details", { class: "cost soft", hidden: true });
    this.code = el("pre", { tabindex: 0, hidden: true, "aria-label": "Code of this request" });
    this.select = el("button", { type: "button", class: "quiet", onclick: () => context.select(this) }, "Show on image");
    this.actions = el("div", { class: "actions", hidden: true }, this.select,
      this.copier("Copy as curl", asCurl), this.copier("Copy as Python", asPython));
    const heading = context.compared ? el("h3", {}, title(look)) : null;
    const where = region ? el("p", { class: "soft" }, `In your region: ${named(region)}`) : null;
    this.element = el("article", { class: "run", "aria-label": title(region ? "region" : look) }, heading, where,
      ...(context.compared ? [this.answer, this.said, this.seen] : [this.said, this.seen, this.answer]), this.note, this.cost, this.actions, this.code);
  }

  get ms() { return (this.ended ?? performance.now()) - this.begun; }

  add(text) {
    this.first ??= performance.now();
    this.text += text;
    this.answer.classList.remove("waiting");
    this.answer.textContent = this.text;
    this.answer.classList.toggle("long", this.text.length > 90);
  }

  // A look has been taken: what was written before it is no part of the answer.
  addLook(look) {
    this.looks.push(look);
    this.said.textContent += this.text;
    this.said.hidden = !this.said.textContent.trim();
    this.text = this.answer.textContent = "";
    this.answer.classList.add("waiting");
    this.seen.append(look.problem ? el("p", { class: "soft" }, `Wanted to look again, but ${look.problem}.`)
      : this.figure(look));
  }

  figure(look) {
    const { image, grid, compared } = this.context;
    const crop = look.crop && look.kind === "region" ? el("img", { src: look.crop, alt: "What it saw there" }) : null;
    const small = () => {
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      svg.setAttribute("aria-hidden", "true");
      overlay(svg, image, grid, [look]);
      return el("div", { class: "frame small" }, el("img", { src: image.shown, alt: "" }), svg);
    };
    const shown = [compared || !crop ? small() : null, crop && el("div", { class: "crop" }, crop)];
    if (crop && !compared) this.slide(crop, look);
    return el("figure", {}, ...shown, el("figcaption", { class: "soft" }, describe(look, image)));
  }

  // The crop comes out of its place on the image.
  slide(crop, look) {
    if (still() || !look.box) return;
    crop.decode().then(() => {
      const place = this.context.place(look.box), to = crop.getBoundingClientRect();
      if (!to.width) return;
      const move = `translate(${place.left - to.left}px, ${place.top - to.top}px) `
        + `scale(${place.width / to.width}, ${place.height / to.height})`;
      crop.animate([{ transform: move, opacity: 0.4, zIndex: 5 }, { transform: "none", opacity: 1, zIndex: 5 }],
        { duration: 700, easing: "cubic-bezier(.2, .8, .2, 1)" });
    }, () => {});
  }

  // The events of an answer that was given before, a `chat.completion`; its time is that of the model.
  async* known({ choices: [{ message, finish_reason: finish }], relook }) {
    for (const look of relook.looks) yield { look };
    if (message.content) yield { text: message.content };
    this.begun = performance.now() - 1000 * Object.values(relook.usage.seconds).reduce((sum, s) => sum + s, 0);
    this.first = null;
    yield { result: relook, kept: message.relook, finish };
  }

  finish({ result, kept, finish }) {
    Object.assign(this, { result, kept, state: "done" });
    const extra = (result.warnings ?? []).filter((each) => !this.context.known.includes(each));
    if (finish === "length") extra.push("The answer was cut off at the limit of tokens.");
    if (!this.text.trim()) this.answer.textContent = "(It said nothing.)";
    this.end(extra.join(" "));
    this.note.classList.add("mild");
    const usage = result.usage ?? {};
    const facts = [seconds(this.ms), this.first && `first word after ${seconds(this.first - this.begun)}`,
      usage.lm_positions && `${count(usage.lm_positions)} positions`,
      usage.vision_patches && `${count(usage.vision_patches)} patches`,
      usage.cached_tokens && `${count(usage.cached_tokens)} tokens reused`].filter(Boolean);
    const rows = [...Object.entries(COSTS).filter(([name]) => usage[name] != null).map(([name, what]) => [what, count(usage[name])]),
      ...Object.entries(usage.seconds ?? {}).map(([name, s]) => [STAGES[name] ?? name, seconds(s * 1000)])];
    const turns = (result.transcript ?? []).map((turn) => el("p", {}, el("b", {}, turn.role), ` ${turn.text}`));
    this.cost.append(el("summary", {}, facts.join(" · ")),
      el("dl", {}, ...rows.flatMap(([what, value]) => [el("dt", {}, what), el("dd", {}, value)])),
      turns.length ? el("div", { class: "turns" }, ...turns) : null);
    this.cost.hidden = false;
  }

  fail(sentence, state = "failed") {
    Object.assign(this, { state });
    this.end(sentence);
    this.note.classList.toggle("mild", state === "stopped");
  }

  end(note) {
    this.ended = performance.now();
    this.answer.classList.remove("waiting");
    this.note.textContent = note;
    this.note.hidden = !note;
    this.actions.hidden = false;
  }

  shown(yes) {
    this.element.classList.toggle("shown", yes);
    this.select.setAttribute("aria-pressed", yes);
    this.select.textContent = yes ? "Shown on image" : "Show on image";
  }

  copier(label, write) {
    const copy = async () => {
      const text = write(this.context.body(this), this.context.image, this.context.key());
      try {
        await navigator.clipboard.writeText(text);
        this.context.say("Copied.");
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = label; }, 1500);
      } catch { // no clipboard where the page came by plain http from another machine
        this.code.textContent = text;
        this.code.hidden = false;
        this.code.focus();
        getSelection().selectAllChildren(this.code);
        this.context.say("This browser does not let the page copy; the code is selected, copy it from there.");
      }
    };
    const button = el("button", { type: "button", class: "quiet", onclick: copy }, label);
    return button;
  }
}
