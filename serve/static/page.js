import { bicubic, blend, draw, picture, pixelsOf, put } from "/static/canvas.js";
import { Hole } from "/static/hole.js";
import { Asked } from "/static/server.js";
import { View } from "/static/view.js";
import { unzipped, zipped } from "/static/zip.js";

const $ = (id) => document.getElementById(id);
const view = new View($("view"), $("split"));
const hole = new Hole($("hole-picture"), $("hole-layer"), $("brush"));
const FILE = "JPEG, PNG, WebP, TIFF, HEIC, AVIF, JPEG XL, GIF or BMP";
let models = new Map(); // what a request may ask of each model, by name
let items = []; // the chosen pictures: {file, asked, fidelity, made by fidelity, state, error}
let shown = null; // the one in the view
let running = null; // the request in progress
let isBatch = false; // several pictures are being worked on
let sources = {}; // canvases to compare with
const links = { result: "", steps: "", all: "" }; // object URLs

const headers = () => ($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {});
const model = () => models.get($("model").value) ?? {};

async function learn() {
  const answer = await fetch("/v1/models", { headers: headers() });
  $("key-field").hidden = answer.status !== 401 && !$("key").value;
  if (!answer.ok) return;
  const { models: listed, limits } = await answer.json();
  const chosen = $("model").value;
  models = new Map(listed.map((one) => [one.name, one]));
  $("model").replaceChildren(...listed.map(({ name, scale }) => new Option(`${name} (×${scale})`, name, false, name === chosen)));
  $("accepts").textContent = `${FILE}, up to ${limits.megapixels} megapixels each. Pictures are sent only to this server.`;
  offer();
}

// Show the options that the chosen model has.
function offer() {
  const { steps = 1, seed, fidelity, faces } = model();
  $("steps-field").hidden = steps === 1;
  $("steps").replaceChildren(...Array.from({ length: steps }, (_, i) => new Option(i ? steps - i : `${steps} (all)`, i ? steps - i : "")));
  $("seed-field").hidden = !seed;
  $("faces-field").hidden = !faces;
  $("fidelity-field").hidden = !fidelity;
  title();
}

function title() {
  const { mask } = model();
  $("again").textContent = mask ? "Fill the hole" : items.length > 1 ? "Upscale all again" : "Upscale again";
}

async function watch() {
  try {
    const { ready } = await (await fetch("/readyz")).json();
    $("health").dataset.state = ready ? "ready" : "away";
    $("health").lastElementChild.textContent = ready ? "ready" : "the model is starting";
  } catch {
    $("health").dataset.state = "away";
    $("health").lastElementChild.textContent = "no connection";
  }
  setTimeout(watch, document.hidden ? 30000 : 5000);
}

function complain(text) {
  $("error").textContent = text;
  $("error").classList.remove("asked");
  $("error").hidden = !text;
}

function take(files) {
  if (!files.length) return;
  if (model().mask && files.length > 1) {
    complain("A hole is painted into one picture: choose one at a time.");
    return;
  }
  items = Array.from(files, (file) => ({ file, made: new Map(), state: "waiting" }));
  $("drop").classList.add("small");
  $("again").disabled = false;
  title();
  if (model().mask) paint();
  else upscale();
}

// The hole of the chosen picture is drawn if the chosen model fills holes.
async function paint() {
  title();
  $("hole").hidden = true; // until the picture is there
  const [item] = items;
  if (!model().mask || !item) return;
  const image = await picture(item.file);
  if (items[0] !== item) return;
  stop("");
  complain(image ? "" : "This browser cannot display the picture, so no hole can be drawn.");
  $("hole").hidden = !image;
  if (image) hole.show(image);
}

// The body of a request: the picture, with its mask if the model fills holes.
async function bodyOf(file) {
  if (!model().mask) return file;
  if (hole.isEmpty || $("hole").hidden) throw new Error("Paint the hole first.");
  const form = new FormData();
  form.append("image", file);
  form.append("mask", await hole.mask(), "mask.png");
  return form;
}

function parameters() {
  const asked = {};
  for (const name of ["model", "outscale", "format", "metadata"]) if ($(name).value) asked[name] = $(name).value;
  for (const name of ["steps", "seed", "faces", "quality"]) if (!$(`${name}-field`).hidden && $(name).value) asked[name] = $(name).value;
  return asked;
}

// Above this many pixels, or where they are not known, the answer may take longer than a request may: it is asked
// for as a job, and looked after.
const MOST_AT_ONCE = 250000;

async function isLong(file) {
  const image = await picture(file);
  return !image || image.width * image.height > MOST_AT_ONCE;
}

function stop(text) {
  const stopped = running;
  running = null;
  if (!stopped) return;
  stopped.cancel();
  $("progress").hidden = true;
  complain(text);
  $("error").classList.add("asked"); // what somebody asked for is no failure
}

// Send a picture; return what was made of it, or null when that is no longer wanted.
async function ask(item, further, prefix = "") {
  stop("");
  const began = performance.now();
  const mine = (running = new Asked(headers(), (text, share) => { if (running === mine) stage(prefix + text, share); }));
  const clock = setInterval(() => { if (running === mine) $("clock").textContent = `${((performance.now() - began) / 1000).toFixed(1)} s`; }, 100);
  $("progress").hidden = false;
  stage(`${prefix}Sending`, 0);
  try {
    const [body, isJob] = [await bodyOf(item.file), await isLong(item.file)];
    if (running !== mine) return null;
    const made = await mine.run(body, new URLSearchParams({ ...item.asked, ...further }), isJob);
    return made && running === mine ? { ...made, seconds: (performance.now() - began) / 1000 } : null;
  } finally {
    clearInterval(clock);
    if (running === mine) {
      running = null;
      $("progress").hidden = true;
    }
  }
}

// The options of a request for a share of what invents nothing: 0 is the model, and models without it have no other.
const faithful = (fidelity) => (fidelity === "0" ? {} : { fidelity });
const share = () => ($("fidelity-field").hidden ? "0" : String(Number($("fidelity").value)));

// Upscale the chosen pictures, one after the other: the server has others to care for.
async function upscale() {
  stop("");
  complain("");
  const [chosen, asked, fidelity] = [items, parameters(), share()];
  for (const item of chosen) Object.assign(item, { asked, fidelity, made: new Map(), state: "waiting", ends: null, canBlend: !$("fidelity-field").hidden });
  hold(chosen.length > 1);
  let isFirst = true;
  for (const [i, item] of chosen.entries()) {
    item.state = "working";
    list();
    let made = null;
    try {
      made = await ask(item, faithful(fidelity), chosen.length > 1 ? `${i + 1} of ${chosen.length}: ` : "");
      if (items !== chosen || item.asked !== asked) return; // others were chosen, or all are asked for again
      item.state = made ? "done" : "waiting";
    } catch (error) {
      if (items !== chosen || item.asked !== asked) return;
      Object.assign(item, { state: "failed", error: error.message });
      if (chosen.length === 1) complain(error.message);
      if (error.status === 401) { $("key-field").hidden = false; $("key").focus(); }
      if (error.status === 401 || error.status === 0) break;
      continue;
    }
    if (!made) break;
    item.made.set(fidelity, made);
    if (isFirst) await show(item);
    isFirst = false;
  }
  hold(false);
  const failed = chosen.filter(({ state }) => state === "failed");
  if (failed.length && chosen.length > 1) complain(`${failed.length} of ${chosen.length} failed: ${failed[0].file.name}: ${failed[0].error}`);
}

// While several pictures are worked on, what would need another request waits.
function hold(isHeld) {
  isBatch = isHeld;
  $("fidelity").disabled = $("show-steps").disabled = isHeld;
  list();
}

// The list of several pictures, with what became of each.
function list() {
  $("files").hidden = items.length < 2;
  $("list").replaceChildren(...items.map((item) => {
    const row = document.createElement("li");
    const name = document.createElement(item.made.size ? "button" : "span");
    const told = document.createElement("small");
    name.textContent = item.file.name;
    if (item.made.size) Object.assign(name, { type: "button", className: "plain", onclick: () => show(item) });
    const made = item.made.get(item.fidelity);
    told.textContent = item.state === "failed" ? item.error : made ? `${made.pictureSize} → ${made.size}, ${bytes(made.blob)}`.replaceAll("x", " × ") : item.state;
    row.dataset.state = item.state;
    row.append(name, told);
    return row;
  }));
  const made = items.filter((item) => item.made.get(item.fidelity));
  $("all").hidden = !made.length;
  $("all").disabled = isBatch;
  $("all").textContent = `Download ${made.length === 1 ? "it" : `all ${made.length}`} (ZIP)`;
}

async function downloadAll() {
  try {
    const entries = items.filter((item) => item.made.get(item.fidelity)).map((item) => {
      const made = item.made.get(item.fidelity);
      return { name: named(item, made), blob: made.blob };
    });
    save("all", await zipped(entries), "pictures.zip");
  } catch (error) {
    complain(`There is no ZIP file: ${error.message}`);
  }
}

function save(kind, blob, name) {
  URL.revokeObjectURL(links[kind]);
  links[kind] = URL.createObjectURL(blob);
  Object.assign(document.createElement("a"), { href: links[kind], download: name }).click();
}

const named = (item, made) => made.name.replace(/^picture/, item.file.name?.replace(/\.[^.]*$/, "") || "picture");
const bytes = (blob) => (blob.size < 1e6 ? `${(blob.size / 1e3).toFixed(0)} kB` : `${(blob.size / 1e6).toFixed(1)} MB`);

function stage(text, share) {
  $("stage").textContent = text;
  $("bar").classList.toggle("waiting", share === null);
  $("bar").style.transform = share === null ? "" : `scaleX(${share})`;
  if (share === null) $("bar").removeAttribute("aria-valuenow");
  else $("bar").setAttribute("aria-valuenow", Math.round(100 * share));
}

async function compare() {
  const against = document.querySelector("[name=against]:checked").value;
  const chosen = sources;
  if (!chosen.input) return;
  const { width, height } = chosen.size;
  if (against === "bicubic") {
    chosen.bicubic ??= bicubic(chosen.input, width, height);
    const made = await chosen.bicubic;
    if (sources !== chosen || document.querySelector("[name=against]:checked").value !== against) return;
    put($("before"), made);
  } else {
    draw($("before"), chosen.input, chosen.input.width, chosen.input.height);
  }
  $("tag-before").textContent = against;
  view.draw();
}

async function show(item) {
  const made = item.made.get(item.fidelity);
  shown = item;
  const [input, output] = await Promise.all([picture(item.file), picture(made.blob)]);
  if (shown !== item || item.made.get(item.fidelity) !== made) return;
  const [width, height] = made.size.split("x").map(Number);
  offerFile(item, made);
  $("result").hidden = false;
  $("view").hidden = !output;
  const isComparable = Boolean(output && input);
  for (const element of [$("before-layer"), $("divider"), $("tag-before")]) element.hidden = !isComparable;
  $("split").disabled = !isComparable;
  $("trajectory").hidden = true;
  $("show-steps").hidden = !output || Number(item.asked.steps || models.get(item.asked.model)?.steps || 1) === 1;
  if (item.canBlend) setShare(item.fidelity);
  sources = { input, size: { width, height } };
  if (output) {
    draw($("after"), output, width, height);
    $("tag-after").textContent = "ours";
    if (input) draw($("before"), input, input.width, input.height);
    view.show(width, height);
  }
  facts(made, output);
  if (isComparable) await compare();
  $("result").dataset.done = String(Number($("result").dataset.done || 0) + 1);
  $("result").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

function offerFile(item, made) {
  URL.revokeObjectURL(links.result);
  links.result = URL.createObjectURL(made.blob);
  $("download").href = links.result;
  $("download").download = named(item, made);
}

function facts(made, isShown) {
  const listed = [
    ["Time", `${made.seconds.toFixed(2)} s`],
    ["Model time", made.modelSeconds ? `${made.modelSeconds.toFixed(2)} s` : ""],
    ["Size", `${made.pictureSize} → ${made.size}`.replaceAll("x", " × ")],
    ["File", bytes(made.blob)],
    ["Model", made.model || $("model").value],
    ["Notes", made.notes || (isShown ? "" : "this browser cannot display the format")],
  ];
  $("facts").replaceChildren(...listed.filter(([, value]) => value).map(([name, value]) => {
    const pair = document.createElement("div");
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    dt.textContent = name;
    dd.textContent = value;
    pair.append(dt, dd);
    return pair;
  }));
}

function setShare(fidelity) {
  $("fidelity").value = fidelity;
  $("fidelity-told").textContent = Number(fidelity).toFixed(2);
}

// The picture in the view follows the slider: the two ends are asked for once, and mixed here.
async function slide() {
  setShare($("fidelity").value);
  const item = shown;
  if (!item?.canBlend || $("view").hidden || isBatch) return;
  try {
    item.ends ??= endsOf(item);
    const ends = await item.ends;
    if (shown !== item || !ends) return;
    $("trajectory").hidden = true;
    $("tag-after").textContent = "ours";
    put($("after"), blend(...ends, Number($("fidelity").value)));
    const made = item.made.get(share());
    if (made) { offerFile(item, made); facts(made, true); }
    $("result").dataset.share = share();
  } catch (error) {
    item.ends = null;
    complain(error.message);
  }
}

async function endsOf(item) {
  const made = [];
  for (const end of ["0", "1"]) {
    if (!item.made.has(end)) {
      const one = await ask(item, faithful(end), "The other end of the slider: ");
      if (!one) { item.ends = null; return null; }
      item.made.set(end, one);
    }
    made.push(pixelsOf(await picture(item.made.get(end).blob)));
  }
  return made;
}

// A file between the ends is the server's, made when it is wanted: it has the depth and the metadata.
async function download(event) {
  const [item, fidelity] = [shown, share()];
  if (!item.canBlend || isBatch || item.made.has(fidelity)) return;
  event.preventDefault();
  try {
    const made = await ask(item, faithful(fidelity));
    if (!made) return;
    item.made.set(fidelity, made);
    save("result", made.blob, named(item, made));
  } catch (error) {
    complain(error.message);
  }
}

// What each step of the chain predicts, as a strip of pictures to choose from.
async function showSteps() {
  const item = shown;
  try {
    const made = await ask(item, { ...faithful(item.fidelity), trajectory: true, format: "png" }, "The steps: ");
    if (!made || shown !== item) return;
    const entries = await unzipped(made.blob, "image/png");
    const images = await Promise.all(entries.map(({ blob }) => picture(blob)));
    $("trajectory").hidden = false;
    $("strip").replaceChildren(...images.map((image, i) => {
      const [button, canvas, label] = ["button", "canvas", "span"].map((name) => document.createElement(name));
      const small = Math.min(1, 240 / Math.max(image.width, image.height));
      draw(canvas, image, Math.max(1, Math.round(image.width * small)), Math.max(1, Math.round(image.height * small)));
      label.textContent = `step ${i + 1} of ${images.length}`;
      button.type = "button";
      button.append(canvas, label);
      button.onclick = () => {
        for (const one of $("strip").children) one.setAttribute("aria-pressed", one === button);
        draw($("after"), image, image.width, image.height);
        $("tag-after").textContent = label.textContent;
        view.draw();
      };
      return button;
    }));
    $("strip").lastElementChild.click();
    $("save-steps").onclick = () => save("steps", made.blob, named(item, made));
    $("trajectory").scrollIntoView({ block: "nearest", behavior: "smooth" });
  } catch (error) {
    complain(error.message);
  }
}

$("file").addEventListener("change", () => { take($("file").files); $("file").value = ""; });
$("options").addEventListener("submit", (event) => { event.preventDefault(); if (items.length) upscale(); });
$("format").addEventListener("change", () => { $("quality-field").hidden = !["jpeg", "webp", "avif", "jxl"].includes($("format").value); });
$("model").addEventListener("change", () => { offer(); paint(); });
$("clear").addEventListener("click", () => hole.clear());
$("key").addEventListener("change", learn);
$("cancel").addEventListener("click", () => stop("Cancelled."));
$("fidelity").addEventListener("input", slide);
$("download").addEventListener("click", download);
$("show-steps").addEventListener("click", showSteps);
$("all").addEventListener("click", downloadAll);
for (const radio of document.querySelectorAll("[name=against]")) radio.addEventListener("change", compare);
$("zoom-in").addEventListener("click", () => view.zoom(1.5, $("view").clientWidth / 2, $("view").clientHeight / 2));
$("zoom-out").addEventListener("click", () => view.zoom(1 / 1.5, $("view").clientWidth / 2, $("view").clientHeight / 2));
$("fit").addEventListener("click", () => view.fit());
$("actual").addEventListener("click", () => view.actual());
document.addEventListener("paste", (event) => take([...event.clipboardData.files].filter((file) => file.type.startsWith("image/"))));
let depth = 0; // dragenter and dragleave fire for every element that the pointer crosses
document.addEventListener("dragenter", (event) => { event.preventDefault(); depth++; $("drop").classList.add("over"); });
document.addEventListener("dragleave", () => { if (!--depth) $("drop").classList.remove("over"); });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  $("drop").classList.remove("over");
  take(event.dataTransfer.files);
});
learn().catch(() => complain("The server cannot be reached."));
watch();
