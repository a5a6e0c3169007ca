// The triples of report.html: filtered by round, feature, status and text, drawn a page at a time. Texts go in as textContent only.
"use strict";
const triples = JSON.parse(document.getElementById("triples-data").textContent);
const list = document.getElementById("triples"), count = document.getElementById("count"), more = document.getElementById("more");
const controls = Object.fromEntries(["iteration", "feature", "status", "text"].map((name) => [name, document.getElementById(name)]));
const SIDES = [
  ["chosen", "y+ under the good principle"],
  ["rejected", "y- under the bad principle"],
  ["original", "y_o without a principle"],
];
const CONTEXTS = { plain: "x", positive: "x+", negative: "x-" };
const PAGE = 25;
let shown = [], drawn = 0;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function response(triple, name, label) {
  const box = element("div", name);
  box.append(element("span", "label", label), element("span", "said", triple[name]));
  const means = Object.entries((triple.log_probs || {})[name] || {}).map(([context, value]) => `${CONTEXTS[context] || context} ${value}`);
  const parts = [];
  if ((triple.tokens || {})[name]) parts.push(`${triple.tokens[name]} tokens`);
  if (means.length) parts.push(`log-prob a token under ${means.join(", ")}`);
  if (triple.scores && triple.scores[name] !== undefined) parts.push(`score ${triple.scores[name].toFixed(3)}`);
  box.append(element("span", "numbers", parts.join("; ")));
  return box;
}

function card(triple) {
  const made = element("div", "card item");
  made.append(element("div", "query", triple.query));
  const facts = [`iteration ${triple.iteration}`, triple.id, triple.features.join(", "), triple.status.replaceAll("_", " ")];
  if (triple.swapped) facts.push("swapped by a control");
  if (triple.judged) facts.push(`endpoint judge: ${triple.judged}`);
  made.append(element("div", triple.status === "kept" ? "features" : "features left-out", facts.filter(Boolean).join(" \u00b7 ")));
  if (triple.good_system || triple.bad_system) {
    const principles = element("div", "principles");
    principles.append(element("div", "good", `p+ ${triple.good_system}`), element("div", "bad", `p- ${triple.bad_system}`));
    made.append(principles);
  }
  const sides = element("div", "triple");
  for (const [name, label] of SIDES) if (triple[name] !== undefined && triple[name] !== null) sides.append(response(triple, name, label));
  made.append(sides);
  return made;
}

function draw() {
  const end = Math.min(drawn + PAGE, shown.length), page = document.createDocumentFragment();
  for (; drawn < end; drawn++) page.append(card(shown[drawn]));
  list.append(page);
  more.hidden = drawn >= shown.length;
  more.textContent = `${shown.length - drawn} more`;
}

function filter() {
  const { iteration, feature, status, text } = Object.fromEntries(Object.entries(controls).map(([name, control]) => [name, control.value]));
  const wanted = text.toLowerCase();
  const holds = (triple) => [triple.query, triple.chosen, triple.rejected, triple.original].some((t) => t && t.toLowerCase().includes(wanted));
  shown = triples.filter(
    (triple) =>
      (!iteration || String(triple.iteration) === iteration) &&
      (!feature || triple.features.includes(feature)) &&
      (!status || (status === "dropped" ? triple.status !== "kept" : triple.status === status)) &&
      (!wanted || holds(triple)),
  );
  count.textContent = `${shown.length} of ${triples.length} triples`;
  list.replaceChildren();
  drawn = 0;
  draw();
  const state = Object.entries({ iteration, feature, status, text }).filter(([, value]) => value);
  history.replaceState(null, "", state.length ? `#${new URLSearchParams(state)}` : location.pathname);
}

function options(name, values) {
  for (const [value, text] of values) controls[name].append(new Option(text, value));
}

function tally(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]).map(([value, times]) => [value, `${String(value).replaceAll("_", " ")} (${times})`]);
}

options("iteration", tally(triples.map((triple) => triple.iteration)).sort((a, b) => a[0] - b[0]));
options("feature", tally(triples.flatMap((triple) => triple.features)));
const statuses = tally(triples.map((triple) => triple.status));
if (statuses.length > 1) options("status", [["dropped", `dropped (${triples.filter((triple) => triple.status !== "kept").length})`]]);
options("status", statuses);
const asked = new URLSearchParams(location.hash.slice(1));
for (const [name, control] of Object.entries(controls)) {
  if (asked.get(name)) control.value = asked.get(name);
  control.addEventListener("input", filter);
}
more.addEventListener("click", draw);
filter();
