// The browser of records: filters, a list in pages, and one answer with its image, boxes, crops, maps and judge.
// Data is the JSON of browse.py. Text of records goes into text nodes and attributes only, never into markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { questions, answers, rows, pictures } = data;
  const PAGE = 50;
  const MARKS = { right: "✓", partly: "~", wrong: "✗", unscored: "?", failed: "!", skipped: "–" };
  const ANY = { "": "any" };
  const at = (id) => document.getElementById(id);
  let listed = []; // numbers of the answers that pass the filters
  let page = 0;
  let current = null; // number of the answer that is shown

  // ---- elements

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  }
  const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  // An SVG in pixels of the original that fills its column up to a share of the window's height.
  function sheet(attributes, [x, y, width, height], most, ...children) {
    const drawing = s("svg", { viewBox: `${x} ${y} ${width} ${height}`, role: "img", ...attributes }, ...children);
    drawing.style.width = `min(100%, ${(most * width / height).toFixed(2)}vh)`;
    return drawing;
  }
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  // ---- what an answer is

  function outcome(answer) {
    if (answer.failed) return "failed";
    if (answer.skipped) return "skipped";
    const score = (answer.scores || {})[at("score").value];
    if (score === undefined) return "unscored";
    return score >= 1 ? "right" : score <= 0 ? "wrong" : "partly";
  }

  // What looks were taken, as the filter names them.
  function kinds(answer) {
    if (!answer.looks) return answer.failed || answer.skipped ? [] : ["no look"];
    return answer.looks.map((look) => (look.problem ? `${look.kind}, not taken` : look.kind));
  }

  // What the look was worth in an answer's question: the run's own way ("auto") against no look, in the chosen score.
  function effect(answer) {
    const find = (look) => together[answer.question].map((each) => answers[each]).find((each) =>
      rows[each.row].look === look && rows[each.row].run === rows[answer.row].run && each.folder === answer.folder);
    const scored = (each) => each && (each.scores || {})[at("score").value];
    const [own, without] = [find("auto"), find("none")];
    if (scored(own) === undefined || scored(without) === undefined) return "";
    if (!(own.looks || []).some((look) => !look.problem)) return "no look";
    const [right, before] = [scored(own) >= data.right, scored(without) >= data.right];
    return right ? (before ? "idle" : "needed") : before ? "harmful" : "useless";
  }

  const haystacks = [];
  function haystack(number) {
    if (haystacks[number] === undefined) {
      const answer = answers[number];
      const question = questions[answer.question];
      const parts = [question.text, question.accepted.join("\n"), answer.text || "", question.where, question.image || ""];
      haystacks[number] = [...parts, answer.failed || "", question.index].join("\n").toLowerCase();
    }
    return haystacks[number];
  }

  const together = questions.map(() => []); // question -> numbers of its answers
  answers.forEach((answer, number) => together[answer.question].push(number));

  // ---- filters

  function options(select, values, labels = {}) {
    select.replaceChildren(...values.map((value) => h("option", { value }, labels[value] ?? value)));
  }
  const distinct = (values) => [...new Set(values)].filter((value) => value !== undefined).sort();

  function prepare() {
    options(at("score"), data.scores);
    options(at("task"), ["", ...data.tasks], ANY);
    const used = distinct(answers.map((answer) => answer.row)).sort((a, b) => a - b);
    const names = { ...ANY };
    for (const row of used) names[row] = rows[row].title === rows[row].name ? rows[row].name : `${rows[row].name}: ${rows[row].title}`;
    options(at("row"), ["", ...used.map(String)], names);
    options(at("other"), ["", ...used.map(String)], { ...names, "": "anything" });
    options(at("kind"), ["", ...distinct(answers.flatMap(kinds))], ANY);
    options(at("field"), ["", ...distinct(questions.map((question) => question.field))], ANY);
    options(at("effect"), ["", "needed", "idle", "harmful", "useless", "no look"], ANY);
    at("effect").closest("label").hidden = !answers.some(effect);
    options(at("other-outcome"), ["right", "wrong", "partly", "failed"]);
    for (const id of ["task", "field", "score"]) at(id).closest("label").hidden = at(id).length < (id === "score" ? 2 : 3);
    for (const id of ["other", "other-outcome"]) at(id).closest("label").hidden = used.length < 2;
    at("pictured").closest("label").hidden = !pictures.length || questions.every((question) => question.picture !== undefined);
    at("outcomes").append(
      ...["all", ...Object.keys(MARKS)].map((name) =>
        h("label", { class: "choice" }, h("input", { type: "radio", name: "outcome", value: name, checked: name === "all" }),
          h("span", {}, name, h("b", { id: `count-${name}` })))));
  }

  function chosen() {
    const value = (id) => at(id).value;
    return {
      outcome: document.querySelector("input[name=outcome]:checked").value,
      task: value("task"), row: value("row"), kind: value("kind"), field: value("field"), effect: value("effect"),
      other: value("other"), otherOutcome: value("other-outcome"),
      words: value("text").toLowerCase().split(/\s+/).filter(Boolean), pictured: at("pictured").checked,
    };
  }

  // Whether an answer passes every filter but the outcome's.
  function passes(number, wanted) {
    const answer = answers[number];
    const question = questions[answer.question];
    if (wanted.task && question.task !== wanted.task) return false;
    if (wanted.row && answer.row !== Number(wanted.row)) return false;
    if (wanted.field && question.field !== wanted.field) return false;
    if (wanted.pictured && question.picture === undefined) return false;
    if (wanted.effect && effect(answer) !== wanted.effect) return false;
    if (wanted.kind && !kinds(answer).includes(wanted.kind)) return false;
    if (wanted.other && !together[answer.question].some((each) =>
      answers[each].row === Number(wanted.other) && outcome(answers[each]) === wanted.otherOutcome)) return false;
    return wanted.words.every((word) => haystack(number).includes(word));
  }

  function filter() {
    const wanted = chosen();
    const counts = Object.fromEntries(Object.keys(MARKS).map((name) => [name, 0]));
    listed = [];
    answers.forEach((answer, number) => {
      if (!passes(number, wanted)) return;
      const name = outcome(answer);
      counts[name] += 1;
      if (wanted.outcome === "all" || wanted.outcome === name) listed.push(number);
    });
    counts.all = Object.values(counts).reduce((sum, count) => sum + count, 0);
    for (const [name, count] of Object.entries(counts)) {
      at(`count-${name}`).textContent = count.toLocaleString("en");
      const choice = at(`count-${name}`).closest(".choice");
      choice.hidden = !count && !choice.querySelector("input").checked && !["all", "right", "wrong"].includes(name);
    }
    at("other-outcome").disabled = !wanted.other;
    at("found").textContent = `${plural(listed.length, "answer")} of ${answers.length.toLocaleString("en")}`;
    turn(listed.includes(current) ? Math.floor(listed.indexOf(current) / PAGE) : 0);
    if (!listed.includes(current)) show(listed.length ? listed[0] : null);
    else show(current);
  }

  // ---- the list

  function mark(answer) {
    const name = outcome(answer);
    return h("span", { class: `mark ${name}`, title: name, role: "img", "aria-label": name }, MARKS[name]);
  }

  function says(answer) {
    if (answer.failed) return `failed: ${answer.failed}`;
    if (answer.skipped) return `skipped: ${answer.skipped}`;
    return answer.text || "(nothing)";
  }

  function entry(number) {
    const answer = answers[number];
    const question = questions[answer.question];
    const place = [data.tasks.length > 1 ? question.task : null, rows[answer.row].name, answer.folder].filter(Boolean).join(" · ");
    return h("li", {}, h("button", { type: "button", class: "entry", "data-answer": number, "aria-current": number === current ? "true" : null },
      h("span", { class: "from" }, h("i", { class: `swatch c${answer.row % 10}` }), `${place} · ${question.index}`),
      h("span", {}, question.text),
      h("span", { class: "says" }, mark(answer), says(answer))));
  }

  function turn(to) {
    const pages = Math.max(Math.ceil(listed.length / PAGE), 1);
    page = Math.min(Math.max(to, 0), pages - 1);
    at("list").replaceChildren(...listed.slice(page * PAGE, (page + 1) * PAGE).map(entry));
    at("list").scrollTop = 0;
    at("page").textContent = `page ${page + 1} of ${pages}`;
    at("before").disabled = page === 0;
    at("after").disabled = page === pages - 1;
  }

  // Show an answer that may stand on another page of the list, and give its entry the focus.
  function go(number, focus) {
    const place = listed.indexOf(number);
    if (place >= 0 && Math.floor(place / PAGE) !== page) turn(Math.floor(place / PAGE));
    show(number);
    const button = at("list").querySelector(`[data-answer="${number}"]`);
    if (button && focus) button.focus();
  }

  function move(event) {
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: PAGE, PageUp: -PAGE, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || !listed.length || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const from = Math.max(listed.indexOf(current), 0);
    go(listed[Math.min(Math.max(from + steps[event.key], 0), listed.length - 1)], true);
  }

  // ---- one answer

  function show(number) {
    current = number;
    for (const button of at("list").querySelectorAll("[aria-current]")) button.removeAttribute("aria-current");
    const button = number === null ? null : at("list").querySelector(`[data-answer="${number}"]`);
    if (button) button.setAttribute("aria-current", "true");
    at("detail").replaceChildren(...(number === null ? [h("p", { class: "without" }, "No answer passes these filters.")] : detail(number)));
  }

  function detail(number) {
    const answer = answers[number];
    const question = questions[answer.question];
    const row = rows[answer.row];
    const name = outcome(answer);
    const looks = (answer.looks || []).map((look) => seen(look, question)).filter(Boolean);
    return [
      h("div", {},
        h("p", { class: "from" }, [question.task, `question ${question.index}`, question.field, answer.folder].filter(Boolean).join(" · ")),
        h("h3", {}, question.text),
        h("dl", {},
          ...pair("answered", h("span", { class: "said-answer" }, mark(answer), says(answer))),
          ...pair(question.accepted.length > 1 ? "accepted" : "right is", question.accepted.join("  ·  ")),
          ...pair("way to look", `${row.name}: ${row.title}${row.about && row.about !== row.title ? ` (${row.about})` : ""}`))),
      h("div", { class: "shown" }, whole(answer, question), looks.length ? h("div", { class: "looks" }, ...looks) : null),
      h("dl", {}, ...numbers(answer, name)),
      ...wrote(answer),
      ...others(number),
      h("p", { class: "from" }, question.image && question.image !== question.where ? `${question.where} · ${question.image}` : question.where),
    ];
  }

  const pair = (term, ...value) => (value[0] === null || value[0] === undefined ? [] : [h("dt", {}, term), h("dd", {}, ...value)]);
  const percent = (value) => (value === undefined ? null : `${(100 * value).toFixed(1)} %`);

  function numbers(answer, name) {
    const scores = Object.entries(answer.scores || {}).map(([score, value]) => `${score} ${value}`).join(", ");
    const judge = answer.judge || {};
    return [
      ...pair("scores", scores || (name === "unscored" ? "none" : null)),
      ...pair("judge", judge.problem ? `unscored: ${judge.problem}` : judge.reply === undefined ? null : `“${judge.reply.trim()}”${judge.model ? ` (${judge.model})` : ""}`),
      ...pair("annotated area seen", percent(answer.recall)),
      ...pair("in the first look", percent(answer.first)),
      ...pair("IoU of the cells named", percent(answer.iou)),
      ...pair("cost", answer.positions === undefined ? null : [plural(answer.positions, "LM position"),
        answer.patches === undefined ? null : plural(answer.patches, "patch").replace("patchs", "patches"),
        answer.seconds === undefined ? null : `${answer.seconds} s`].filter(Boolean).join(", ")),
    ];
  }

  const rectangle = ([x1, y1, x2, y2], kind) =>
    s("rect", { class: `box ${kind}`, x: x1, y: y1, width: Math.max(x2 - x1, 0), height: Math.max(y2 - y1, 0) });

  // The grid over the view that a nested look's cells count in.
  function lines(look) {
    const [x1, y1, x2, y2] = look.frame;
    const steps = Array.from({ length: look.grid + 1 }, (_, i) => i / look.grid);
    const d = steps.map((step) => `M${x1 + step * (x2 - x1)} ${y1}V${y2}M${x1} ${y1 + step * (y2 - y1)}H${x2}`).join("");
    return s("path", { class: "box lines", d });
  }

  // The whole image with the boxes over it, in pixels of the original. Without a picture, the boxes alone where the size is known.
  function whole(answer, question) {
    const size = question.size;
    const picture = question.picture === undefined ? null : pictures[question.picture];
    if (!size) return h("p", { class: "without" }, `No picture: ${question.why}. ${boxes(answer, question)}`);
    const marks = (answer.looks || []).flatMap((look) => [
      look.frame ? lines(look) : null, look.named ? rectangle(look.named, "named") : null, look.box && !look.problem ? rectangle(look.box, "seen") : null]);
    const drawing = sheet({ class: "page", "aria-label": `The image. ${boxes(answer, question)}` }, [0, 0, ...size], 76,
      picture ? s("image", { href: picture.src, width: size[0], height: size[1] }) : null,
      ...marks, ...(question.boxes || []).map((box) => rectangle(box, "truth")));
    const told = [question.boxes ? [h("i", { class: "key truth" }), "annotated"] : [],
      marks.some((each) => each && each.classList.contains("seen")) ? [h("i", { class: "key seen" }), "seen"] : [],
      marks.some((each) => each && each.classList.contains("named")) ? [h("i", { class: "key named" }), "named"] : []].flat();
    return h("figure", {}, drawing, h("figcaption", {}, ...told, picture ? null : ` No picture: ${question.why}.`));
  }

  function boxes(answer, question) {
    const told = (question.boxes || []).map((box) => `annotated ${box.join(",")}`);
    for (const look of answer.looks || []) if (look.box) told.push(`seen ${look.box.join(",")}`);
    return told.length ? `Boxes: ${told.join("; ")}` : "No boxes";
  }

  // What one look saw: the crop, cut from the picture, or the image under its map.
  function seen(look, question) {
    const picture = question.picture === undefined ? null : pictures[question.picture];
    const cells = look.cells ? `, cells x ${look.cells[0]} to ${look.cells[2]}, y ${look.cells[1]} to ${look.cells[3]}${look.frame ? " of the view before" : ""}` : "";
    if (look.problem) return h("p", { class: "without" }, `${look.kind} look, not taken${cells}: ${look.problem}`);
    const name = `${look.kind} look${cells}${look.instead ? `; its crop was ${look.instead}` : ""}`;
    if (look.uncut) return h("p", { class: "without" }, name);
    const view = look.map ? [0, 0, ...(question.size || [0, 0])] : look.box && [look.box[0], look.box[1], look.box[2] - look.box[0], look.box[3] - look.box[1]];
    if (!picture || !view) return h("p", { class: "without" }, view ? `${name}; no picture to cut it from` : `${name}; its map was not recorded`);
    const drawing = sheet({ "aria-label": name }, view, 50,
      s("image", { href: picture.src, width: picture.width, height: picture.height }), ...(look.map ? heat(look, view) : []));
    const size = look.map ? `bright: where it looked (${look.map[0].length} x ${look.map.length} tokens)` : `${view[2]} x ${view[3]} pixels of the original`;
    return h("figure", {}, drawing, h("figcaption", {}, `${name}: ${size}`));
  }

  // The map's tokens over the image; what they do not cover is faded.
  function heat(look, view) {
    const [x1, y1, x2, y2] = look.area;
    const high = look.map.length;
    const wide = look.map[0].length;
    const cell = [(x2 - x1) / wide, (y2 - y1) / high];
    const tokens = look.map.flatMap((line, y) => line.map((value, x) =>
      s("rect", { x: x1 + x * cell[0], y: y1 + y * cell[1], width: cell[0], height: cell[1], fill: colour(value / 100), "fill-opacity": 0.3 + 0.004 * value })));
    const round = (left, top, right, bottom) => `M${left} ${top}H${right}V${bottom}H${left}Z`;
    const fade = round(view[0], view[1], view[0] + view[2], view[1] + view[3]) + round(x1, y1, x2, y2);
    return [s("path", { d: fade, fill: "#fff", "fill-opacity": 0.6, "fill-rule": "evenodd" }),
      s("g", { "shape-rendering": "crispEdges" }, ...tokens)];
  }

  function colour(value) {
    const place = Math.min(Math.max(value, 0), 1) * (data.heat.length - 1);
    const low = Math.min(Math.floor(place), data.heat.length - 2);
    const mixed = data.heat[low].map((each, i) => Math.round(each + (data.heat[low + 1][i] - each) * (place - low)));
    return `rgb(${mixed.join(" ")})`;
  }

  function wrote(answer) {
    if (!answer.said) return [];
    return [h("details", {}, h("summary", {}, "What the model wrote, tokens and all"), ...answer.said.map((text) => h("p", { class: "said" }, text)))];
  }

  function others(number) {
    const beside = together[answers[number].question].filter((each) => each !== number);
    if (!beside.length) return [];
    const entries = beside.map((each) => {
      const answer = answers[each];
      return h("li", {}, h("button", { type: "button", class: "entry", "data-answer": each },
        h("span", {}, h("i", { class: `swatch c${answer.row % 10}` }), [rows[answer.row].name, answer.folder].filter(Boolean).join(" · ")),
        h("span", {}, mark(answer), says(answer))));
    });
    return [h("div", {}, h("p", { class: "from" }, "The same question"), h("ul", { class: "others" }, ...entries))];
  }

  // ---- begin

  prepare();
  at("browser").hidden = false;
  at("filters").addEventListener("input", filter);
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("filters").addEventListener("reset", () => setTimeout(filter));
  at("before").addEventListener("click", () => turn(page - 1));
  at("after").addEventListener("click", () => turn(page + 1));
  at("list").addEventListener("keydown", move);
  for (const id of ["list", "detail"]) {
    at(id).addEventListener("click", (event) => {
      const button = event.target.closest("[data-answer]");
      if (!button) return;
      go(Number(button.dataset.answer), false);
      if (id === "detail") at("detail").focus({ preventScroll: true });
    });
  }
  filter();
})();
