// The page: picks an image, asks, and keeps what was asked (in memory, until the tab is closed).

import { Failure, answer, models } from "./api.js";
import { Collector } from "./collect.js";
import { Run, describe, legend, title } from "./exchange.js";
import { Stage, el, still, touch } from "./stage.js";

const $ = (id) => document.getElementById(id);
const state = { model: null, key: null, talk: null, talks: [], running: null };
try { state.key = sessionStorage.getItem("relook-key"); } catch { /* storage is switched off: the key is asked for again */ }

const say = (text) => { $("status").textContent = text; };
function complain(text) { $("problem").textContent = text; $("problem").hidden = !text; }
const stage = new Stage((region) => { $("marked").firstElementChild.textContent = region ? `In your region: ${stage.named(region)}` : "";
  if (region) say(`Region: ${stage.named(region)}`);
  refresh(); });
const collector = new Collector({ stage, key: () => state.key, say, complain, begin: takeQueued, end: welcome, refused: lock });

// ---- the model and the key

async function begin() {
  complain("");
  try {
    [state.model] = await models(state.key);
  } catch (error) {
    if (error.status !== 401) return complain(error.message);
    if (state.key) complain(error.message);
    return lock();
  }
  const { name, looks, domain, warnings } = state.model;
  $("unlock").hidden = true;
  $("model").textContent = name;
  document.title = `${name} · relook`;
  $("look").replaceChildren(...["auto", "none", ...looks].map((look) => el("option", { value: look }, title(look))));
  $("follow").checked = !domain && !state.model.collects; // single questions: the small models' training, and collected lines
  for (const each of document.querySelectorAll(".warnings")) each.textContent = warnings.join(" ");
  $("compare").hidden = !looks.length;
  stage.setModel(state.model);
  if (state.model.collects) await collector.attempt(() => collector.poll());
  if (!state.talk) await welcome();
}

function lock() {
  for (const id of ["welcome", "stage", "talk", "new"]) $(id).hidden = true;
  $("unlock").hidden = false;
  $("key").focus();
}

$("unlock").addEventListener("submit", async (event) => {
  event.preventDefault();
  state.key = $("key").value.trim();
  try { sessionStorage.setItem("relook-key", state.key); } catch { /* kept in memory only */ }
  await (state.ready = begin());
  if (state.talk && $("unlock").hidden) open(state.talk);
});

// ---- images

async function welcome() {
  state.running?.abort();
  collector.show(null);
  state.talk = null;
  document.body.dataset.view = "welcome";
  for (const id of ["stage", "talk", "new"]) $(id).hidden = true;
  $("welcome").hidden = false;
  $("earlier").hidden = !state.talks.length;
  $("history").replaceChildren(...state.talks.map((talk) => card(talk.image.shown, talk.image.alt, talk.runs.at(-1)?.context.question ?? talk.image.name,
    () => open(talk))));
  if ($("examples").childElementCount) return;
  const found = await fetch("static/examples/index.json").then((got) => (got.ok ? got.json() : []), () => []);
  const fitting = found.filter((each) => !state.model.domain || each.domain === state.model.domain);
  $("try").hidden = !fitting.length;
  $("examples").replaceChildren(...fitting.map((each) => card(`static/examples/${each.file}`, `${each.alt}:`, each.questions[0], async () => {
    const blob = await fetch(`static/examples/${each.file}`).then((got) => got.blob());
    if (await take(blob, each.file, each.alt, each.questions)) ask(each.questions[0]);
  })));
}

const card = (src, alt, text, onclick) => el("li", {}, el("button", { type: "button", class: "pickable", onclick },
  el("img", { src, alt }), " ", el("span", {}, text)));

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = Object.assign(new FileReader(), { onload: () => resolve(reader.result), onerror: () => reject(reader.error) });
    reader.readAsDataURL(blob);
  });
}

// Begins a conversation about an image file (of `entry` of a queue, which history does not list); false where it is none.
async function take(blob, name, alt = "", questions = [], entry = null) {
  await state.ready;
  if (!state.model) return false;
  complain("");
  const shown = URL.createObjectURL(blob), probe = new Image();
  probe.src = shown;
  try {
    await probe.decode();
  } catch {
    complain(`${name || "That"} is no image this browser can show; choose a PNG, JPEG, WebP or GIF.`);
    return false;
  }
  const image = { name, alt: alt || `The image ${name}`, shown, url: await dataUrl(blob), width: probe.naturalWidth, height: probe.naturalHeight };
  const talk = { image, questions, entry, runs: [], active: null };
  if (!entry) state.talks.unshift(talk);
  open(talk);
  return true;
}

// A question of the queue: what the model said of it, or it is asked now.
async function takeQueued(entry, blob) {
  state.running?.abort();
  if (state.talk?.entry) URL.revokeObjectURL(state.talk.image.shown);
  if (await take(blob, entry.name, "", [], entry)) ask(entry.question, [{ look: "auto", region: null }], entry.reply);
}

function open(talk) {
  state.running?.abort();
  collector.show(null);
  state.talk = talk;
  document.body.dataset.view = "talk";
  $("welcome").hidden = true;
  for (const id of ["stage", "talk", "new"]) $(id).hidden = false;
  $("exchanges").replaceChildren(...talk.runs.length ? [...new Set(talk.runs.map((run) => run.context.element))] : []);
  stage.openImage(talk.image);
  if (talk.active) select(talk.active);
  refresh();
  scrollTo({ top: 0 });
  $(touch() ? "frame" : "question").focus({ preventScroll: true });
}

$("file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (file) await take(file, file.name);
});
$("new").addEventListener("click", async () => { await welcome(); $("main").focus(); });
const carried = (data) => [...(data?.files ?? [])][0];
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dragging"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  const file = carried(event.dataTransfer);
  if (file) take(file, file.name); else complain("That was no file; drop an image file, or paste one.");
});
document.addEventListener("paste", (event) => {
  const file = carried(event.clipboardData);
  if (file) { event.preventDefault(); take(file, file.name || "pasted.png"); }
});

// ---- questions

// The request of a run: the turns before it, the image in the first, and which look is wanted.
function body(run) {
  const { question, parent, image } = run.context;
  const messages = [{ role: "user", content: question }];
  for (let before = parent; before; before = before.context.parent) {
    messages.unshift({ role: "user", content: before.context.question },
      { role: "assistant", content: before.text, ...(before.kept && { relook: before.kept }) });
  }
  messages[0].content = [{ type: "image_url", image_url: { url: image.url } }, { type: "text", text: messages[0].content }];
  const wanted = run.region ? { region: run.region } : run.look === "auto" ? null : { look: run.look };
  return { model: state.model.name, messages, ...(wanted && { relook: wanted }) };
}

function select(run) {
  const { talk } = state;
  talk.active = run;
  for (const each of talk.runs) each.shown(each === run);
  stage.show(run.looks, legend(run.looks)
    || (run.state === "done" ? "It answered from the first look at the whole image." : ""));
  if (state.model.collects) collector.show(run, talk);
}

const lookAt = (run) => { if (state.talk?.active === run) select(run); };
const near = (element, block = "nearest") => element.scrollIntoView({ block, behavior: still() ? "auto" : "smooth" });

// Asks `question`, or the shown one again, once for each of `ways` ({look, region}); `reply` is known already.
async function ask(question, ways = [{ look: $("look").value, region: stage.cells }], reply = null) {
  const { talk, model } = state, again = !question;
  if (state.running || (again && !talk.active)) return;
  const before = talk.active?.state === "done" ? talk.active : talk.active?.context.parent ?? null;
  const parent = again ? talk.active.context.parent : $("follow").checked ? before : null;
  const element = el("li", { class: ways.length > 1 ? "compared" : "" });
  const context = {
    question: question || talk.active.context.question, parent, image: talk.image, grid: model.grid,
    known: model.warnings, compared: ways.length > 1, element, select, say, body, key: () => state.key, place: (box) => stage.place(box),
  };
  const runs = ways.map((way) => new Run(way, context));
  element.append(el("h2", {}, context.question), parent ? el("p", { class: "soft" }, "Follow-up") : "",
    el("div", { class: "runs" }, ...runs.map((run) => run.element)));
  talk.runs.push(...runs);
  $("exchanges").append(element);
  $("question").value = "";
  if (touch()) $("question").blur(); // the keyboard on the screen would hide the answer
  if (!stage.pixels) stage.mark(null);
  stage.marking(false);
  state.running = new AbortController();
  select(runs[1] ?? runs[0]);
  refresh();
  near(element);
  say("Reading the image.");
  await Promise.all(runs.map((run) => follow(run, state.running.signal, reply)));
  state.running = null;
  refresh();
  if (runs.length > 1) near(element, "start"); else { near($("warnings")); near(runs[0].answer); }
}

async function follow(run, signal, reply) {
  try {
    for await (const event of reply ? run.known(reply) : answer(body(run), state.key, signal)) {
      if (event.text) run.add(event.text);
      if (event.look) {
        run.addLook(event.look);
        lookAt(run);
        if (!event.look.problem) say(`${describe(event.look, run.context.image)}.`);
        near(run.element);
      }
      if (event.finish) run.finish(event);
    }
    lookAt(run);
    say(`${run.context.compared ? `${title(run.look)}: ` : "Answer: "}${run.text || "nothing"}`);
  } catch (error) {
    if (error.name === "AbortError") run.fail("Stopped.", "stopped");
    else run.fail(error instanceof Failure ? error.message : `Something went wrong in this page: ${error.message}`);
    say(run.note.textContent);
    lookAt(run);
    if (error.status === 401) lock();
  }
}

// Labels and switches that follow from the state.
function refresh() {
  const empty = !$("question").value.trim(), asked = state.talk?.active != null;
  $("marked").hidden = !stage.region || collector.shown;
  if (collector.shown) collector.refresh();
  $("continue").hidden = !asked;
  $("look").disabled = stage.cells != null;
  $("send").textContent = state.running ? "Stop" : empty && asked ? (stage.cells ? "Ask again here" : "Ask again") : "Ask";
  $("send").disabled = $("compare").disabled = !state.running && empty && !asked;
  $("compare").disabled ||= state.running != null;
  const open = (state.talk?.questions ?? []).filter((text) => !state.running && !state.talk.runs.some((run) => run.context.question === text));
  $("suggestions").replaceChildren(...open.map((text) => el("li", {},
    el("button", { type: "button", class: "chip", onclick: () => ask(text) }, text))));
  $("question").placeholder = asked ? "Ask something else" : "Ask about this image";
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.running) state.running.abort(); else ask($("question").value.trim());
});
$("compare").addEventListener("click", () => {
  const ways = ["none", ...state.model.looks].map((look) => ({ look, region: look === "region" ? stage.cells : null }));
  ask($("question").value.trim(), ways);
});
$("question").addEventListener("input", refresh);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!state.running) $("ask").requestSubmit(); }
});
$("unmark").addEventListener("click", () => { stage.mark(null); $("question").focus(); });

state.ready = begin();
