// Answers by hand: the right answer and its box go to the server's file; a queue brings questions, the least sure first.

import { Failure, request } from "./api.js";
import { touch } from "./stage.js";

const $ = (id) => document.getElementById(id);
const HOW = { new: "Saved", corrected: "Corrected", same: "Saved before" };
const POLL = 2000; // ms between looks at how far the model is with the queue

export class Collector {
  // `begin(entry, blob)` opens a question of the queue, `end()` closes it, `refused()` asks for a key.
  constructor(page) {
    Object.assign(this, page, { run: null, shown: false, talk: null, question: null, boxes: [], typed: false, note: "", skipped: [], file: "" });
    $("correct").addEventListener("submit", (event) => { event.preventDefault(); this.attempt(() => this.save()); });
    $("right").addEventListener("input", () => { this.typed = true; });
    $("right").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("correct").requestSubmit(); }
    });
    $("frame").addEventListener("keydown", (event) => { if (event.key === "Enter" && this.shown) $("right").focus(); });
    $("box").addEventListener("click", () => { this.stage.marking(touch()); $("frame").focus(); });
    $("unbox").addEventListener("click", () => { this.stage.mark(null); $("right").focus(); });
    $("next").addEventListener("click", () => this.attempt(() => this.next()));
    $("skip").addEventListener("click", () => { this.skipped.push(this.talk.entry.number); this.attempt(() => this.next()); });
  }

  // The form for an answer, once it stands; null hides it. What was typed for the same question stays.
  show(run, talk = null) {
    const asked = run?.context.question, entry = talk?.entry?.question === asked ? talk?.entry : null;
    if (run && (this.talk !== talk || this.question !== asked)) {
      this.boxes = entry?.bboxs ?? [];
      this.typed = false;
      if (this.boxes.length || this.talk === talk) this.stage.mark(this.boxes.length ? inclusive(this.boxes[0]) : null);
      const sure = entry?.sure == null ? "" : `It was ${Math.round(100 * entry.sure)} % sure of its answer.`;
      this.tell(`${this.note} ${sure}`.trim());
      this.note = "";
    }
    const before = this.shown;
    Object.assign(this, { run, talk, question: asked, shown: run != null && run.state !== "running" });
    $("correct").hidden = !this.shown;
    document.body.classList.toggle("correcting", this.shown);
    if (!this.shown) return;
    if (!this.typed) $("right").value = entry?.answers[0] ?? run.text;
    $("skip").hidden = !talk.entry;
    if (!before && !touch()) $("right").focus({ preventScroll: true });
    this.refresh();
  }

  // What is marked, as boxes of the file; boxes that came with the question stay together until another is marked.
  get marked() {
    const { region } = this.stage;
    if (!region) return [];
    return this.boxes.length && `${inclusive(this.boxes[0])}` === `${region}` ? this.boxes : [[region[0], region[1], region[2] + 1, region[3] + 1]];
  }

  refresh() {
    const { region } = this.stage, more = this.marked.length - 1;
    $("place").firstElementChild.textContent = region ? `Right box: ${this.stage.named(region)}${more ? ` and ${more} more` : ""}`
      : touch() ? "Where is the right box?" : "Drag the right box on the image, or mark it and use the arrow keys.";
    $("unbox").hidden = !region;
  }

  tell(text, wrong = false) {
    $("saved").textContent = text;
    $("saved").className = wrong ? "problem" : "soft";
  }

  async attempt(work) {
    if (this.busy) return;
    this.busy = true;
    try {
      await work();
    } catch (error) {
      if (error.status === 401) return this.refused();
      const said = error instanceof Failure ? error.message : `Something went wrong in this page: ${error.message}`;
      if (this.shown) this.tell(said, true); else this.complain(said);
    } finally {
      this.busy = false;
    }
  }

  async save() {
    const { talk, question, marked: bboxs } = this, answer = $("right").value.trim();
    if (!answer) throw new Failure("The right answer is empty. Say what it is");
    const about = talk.entry ? { number: talk.entry.number } : { image: talk.image.url };
    const { line, saved } = await (await request("collect", this.key(), {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ...about, question, answer, bboxs }),
    })).json();
    this.tell(`${HOW[saved]}: line ${line} of ${this.file}${bboxs.length ? "" : ", without a box"}.`);
    await (talk.entry?.question === question ? this.next($("saved").textContent) : this.poll());
  }

  // ---- the queue

  async next(note = "") {
    const entry = await (await request(`collect/next?${this.skipped.map((number) => `skip=${number}`).join("&")}`, this.key())).json();
    if (entry.number == null) {
      await this.end();
      this.say(`${note} No more questions.`.trim());
      return this.poll();
    }
    try {
      const blob = await (await request(`collect/images/${entry.number}`, this.key())).blob();
      this.note = note;
      await this.begin(entry, blob);
      await this.poll();
    } catch (error) {
      this.skipped.push(entry.number);
      throw error;
    }
  }

  // Says how far the model and the file are, and again until the model is through.
  async poll() {
    clearTimeout(this.timer);
    const { file, lines, queue } = await (await request("collect", this.key())).json();
    this.file = file;
    $("queue").hidden = !queue;
    const said = queue ? progress(file, queue) : `${lines} ${lines === 1 ? "line" : "lines"} in ${file}.`;
    for (const each of document.querySelectorAll(".progress")) each.textContent = said;
    $("next").disabled = queue && queue.saved + queue.failed === queue.total;
    if (queue?.asking) this.timer = setTimeout(() => this.attempt(() => this.poll()), POLL);
  }
}

const inclusive = ([x1, y1, x2, y2]) => [x1, y1, x2 - 1, y2 - 1];

function progress(file, { total, asked, left, asking, saved, failed, problem }) {
  const order = asking ? `The model has answered ${asked}, ${left} are to come; of those answered the least sure is next.`
    : left ? `The model has stopped with ${left} to come.` : saved + failed < total ? "The least sure answer is next." : "";
  return [`${saved} of ${total} saved in ${file}.`, order, failed && `${failed} could not be asked (${problem}).`].filter(Boolean).join(" ");
}
