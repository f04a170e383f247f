import { Hole } from "/static/hole.js";
import { View } from "/static/view.js";

const $ = (id) => document.getElementById(id);
const view = new View($("view"), $("split"));
const hole = new Hole($("hole-picture"), $("hole-layer"), $("brush"));
let filling = new Set(); // names of the models that fill holes
let current = null; // the chosen picture
let request = null; // the request in progress
let link = ""; // object URL of the last result
let sources = {}; // canvases to compare with

function headers() {
  return $("key").value ? { Authorization: `Bearer ${$("key").value}` } : {};
}

async function learn() {
  const answer = await fetch("/v1/models", { headers: headers() });
  $("key-field").hidden = answer.status !== 401 && !$("key").value;
  if (!answer.ok) return;
  const { models, limits } = await answer.json();
  const chosen = $("model").value;
  filling = new Set(models.filter(({ mask }) => mask).map(({ name }) => name));
  $("model").replaceChildren(...models.map(({ name, scale }) => new Option(`${name} (×${scale})`, name, false, name === chosen)));
  const size = `${limits.megapixels} megapixels`;
  askForHole();
  $("accepts").textContent = `JPEG, PNG, WebP, TIFF, HEIC, AVIF, JPEG XL, GIF or BMP, up to ${size}. The picture is sent only to this server.`;
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
  $("error").hidden = !text;
}

const isFilling = () => filling.has($("model").value);

function take(file) {
  if (!file) return;
  current = file;
  $("drop").classList.add("small");
  $("again").disabled = false;
  if (isFilling()) paint();
  else upscale();
}

// The hole of the chosen picture is drawn if the chosen model fills holes.
function askForHole() {
  $("again").textContent = isFilling() ? "Fill the hole" : "Upscale again";
  $("hole").hidden = !isFilling() || !current;
}

async function paint() {
  const file = current;
  askForHole();
  if (!isFilling() || !file) return;
  const shown = await picture(file);
  if (current !== file) return;
  cancel("");
  complain(shown ? "" : "This browser cannot display the picture, so no hole can be drawn.");
  $("hole").hidden = !shown;
  if (shown) hole.show(shown);
}

// The body of a request: the picture, with its mask if the model fills holes; null if no hole was drawn.
async function bodyOf(file) {
  if (!isFilling()) return file;
  if (hole.isEmpty || $("hole").hidden) return null;
  const form = new FormData();
  form.append("image", file);
  form.append("mask", await hole.mask(), "mask.png");
  return form;
}

function parameters() {
  const asked = new URLSearchParams();
  for (const name of ["model", "outscale", "format", "seed", "metadata"]) if ($(name).value) asked.set(name, $(name).value);
  if (!$("quality-field").hidden) asked.set("quality", $("quality").value);
  return asked;
}

// Above this many pixels, or where they are not known, the answer may take longer than a request may: it is asked
// for as a job, and looked after.
const MOST_AT_ONCE = 250000;

async function isLong(file) {
  const shown = await picture(file);
  return !shown || shown.width * shown.height > MOST_AT_ONCE;
}

function cancel(text) {
  const stopped = request;
  request = null; // first: what follows from the end of a request that is not wanted is not shown
  if (!stopped) return;
  if (stopped.job) forget(stopped.job);
  else if (!stopped.isSent) stopped.abort(); // else its answer names the job that is to be forgotten
  $("progress").hidden = true;
  complain(text);
}

function forget(job) {
  return fetch(`/v1/jobs/${job}`, { method: "DELETE", headers: headers() }).catch(() => {});
}

function told(sent) {
  const [pictureSize, size] = [sent.getResponseHeader("X-Picture-Size"), sent.getResponseHeader("X-Result-Size")];
  const timing = Object.fromEntries((sent.getResponseHeader("Server-Timing") || "").split(", ").map((one) => one.split(";dur=")));
  const name = decodeURIComponent((sent.getResponseHeader("Content-Disposition") || "").split("''")[1] || "picture.png");
  const [model, notes] = ["X-Model", "X-Notes"].map((header) => decodeURIComponent(sent.getResponseHeader(header) || ""));
  return { blob: sent.response, pictureSize, size, model, notes, name, modelSeconds: timing.model && timing.model / 1000 };
}

// Wait for a job and return what `told` returns; null when somebody cancelled it.
async function finished(sent) {
  let job = JSON.parse(await sent.response.text());
  if (request !== sent) { // cancelled while the answer that names the job was read
    forget(job.id);
    return null;
  }
  sent.job = job.id;
  const ask = (path, options = {}) => fetch(`/v1/jobs/${job.id}${path}`, { headers: headers(), ...options });
  while (job.state === "queued" || job.state === "running") {
    stage(job.state === "queued" ? "Waiting for its turn" : "Upscaling", null);
    await new Promise((resolve) => setTimeout(resolve, 500));
    if (request !== sent) return null;
    const answer = await ask("");
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    job = await answer.json();
  }
  if (request !== sent) return null;
  if (job.state !== "complete") throw new Error(job.message || `the job is ${job.state}`);
  const blob = await (await ask("/result")).blob();
  forget(job.id); // the picture is here
  sent.job = null;
  const [from, to] = job.result.sizes;
  const extension = { "image/jpeg": "jpg" }[blob.type] || blob.type.replace("image/", "");
  const name = `picture_x${Number((to[0] / from[0]).toPrecision(3))}.${extension}`;
  return { blob, pictureSize: from.join("x"), size: to.join("x"), model: "", notes: job.result.notes.join("; "), name, modelSeconds: job.result.seconds.model };
}

async function upscale() {
  cancel("");
  complain("");
  const file = current;
  const [isJob, body] = [await isLong(file), await bodyOf(file)];
  if (current !== file) return;
  if (!body) {
    complain("Paint the hole first.");
    return;
  }
  const began = performance.now();
  const sent = new XMLHttpRequest();
  const isCurrent = () => request === sent;
  request = sent;
  $("progress").hidden = false;
  stage("Sending", 0);
  const clock = setInterval(() => { if (isCurrent()) $("clock").textContent = `${((performance.now() - began) / 1000).toFixed(1)} s`; }, 100);
  sent.open("POST", `/v1/upscale?${parameters()}`);
  sent.responseType = "blob";
  for (const [name, value] of Object.entries(headers())) sent.setRequestHeader(name, value);
  if (body === file) sent.setRequestHeader("Content-Type", "application/octet-stream");
  if (isJob) sent.setRequestHeader("Prefer", "respond-async");
  sent.upload.onprogress = (event) => { if (isCurrent()) stage("Sending", event.loaded / event.total); };
  sent.upload.onload = () => {
    sent.isSent = isJob;
    if (isCurrent()) stage("Upscaling", null);
  };
  sent.onprogress = (event) => { if (isCurrent() && sent.status === 200) stage("Receiving", event.lengthComputable ? event.loaded / event.total : null); };
  sent.onloadend = async () => {
    if (!isCurrent()) {
      clearInterval(clock);
      if (sent.status === 202) forget(JSON.parse(await sent.response.text()).id);
      return;
    }
    try {
      const made = sent.status === 202 ? await finished(sent) : sent.status === 200 ? told(sent) : null;
      if (made && isCurrent()) await show(file, made, (performance.now() - began) / 1000);
      else if (!isCurrent() || sent.status === 202) return;
      else if (sent.status) await explain(sent);
      else complain("The server cannot be reached.");
    } catch (error) {
      if (isCurrent()) complain(`There is no result: ${error.message}`);
    } finally {
      clearInterval(clock);
    }
    if (isCurrent()) { request = null; $("progress").hidden = true; }
  };
  sent.send(body);
}

function stage(text, share) {
  $("stage").textContent = text;
  $("bar").classList.toggle("waiting", share === null);
  $("bar").style.transform = share === null ? "" : `scaleX(${share})`;
  if (share === null) $("bar").removeAttribute("aria-valuenow");
  else $("bar").setAttribute("aria-valuenow", Math.round(100 * share));
}

async function explain(sent) {
  let told = `The server answered ${sent.status}.`;
  try {
    const problem = JSON.parse(await sent.response.text());
    told = `${problem.title}: ${problem.detail}`;
  } catch { /* a proxy's page instead of problem details: only the status is known */ }
  const wait = sent.getResponseHeader("Retry-After");
  complain(wait ? `${told} (try again in ${wait} s)` : told);
  if (sent.status === 401) { $("key-field").hidden = false; $("key").focus(); }
}

async function picture(blob) {
  try {
    return await createImageBitmap(blob);
  } catch {
    return null; // a format that this browser cannot display
  }
}

function draw(canvas, image, width, height) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(image, 0, 0, width, height);
}

function bicubic(image, width, height) {
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, image.width, image.height);
  const worker = new Worker("/static/bicubic.js");
  return new Promise((resolve, reject) => {
    worker.onmessage = ({ data: made }) => { worker.terminate(); resolve(new ImageData(made.data, made.width, made.height)); };
    worker.onerror = () => { worker.terminate(); reject(new Error("bicubic failed")); };
    worker.postMessage({ width: image.width, height: image.height, data, outWidth: width, outHeight: height }, [data.buffer]);
  });
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
    $("before").width = width;
    $("before").height = height;
    $("before").getContext("2d").putImageData(made, 0, 0);
  } else {
    draw($("before"), chosen.input, chosen.input.width, chosen.input.height);
  }
  $("tag-before").textContent = against;
  view.draw();
}

async function show(file, made, seconds) {
  const { blob } = made;
  URL.revokeObjectURL(link);
  link = URL.createObjectURL(blob);
  const [input, output] = await Promise.all([picture(file), picture(blob)]);
  const [width, height] = made.size.split("x").map(Number);
  $("download").href = link;
  $("download").download = made.name.replace(/^picture/, file.name?.replace(/\.[^.]*$/, "") || "picture");
  $("result").hidden = false;
  $("view").hidden = !output;
  const isComparable = Boolean(output && input);
  for (const element of [$("before-layer"), $("divider"), $("tag-before")]) element.hidden = !isComparable;
  $("split").disabled = !isComparable;
  sources = { input, size: { width, height } };
  if (output) {
    draw($("after"), output, width, height);
    if (input) draw($("before"), input, input.width, input.height);
    view.show(width, height);
  }
  facts(made, seconds, output);
  if (isComparable) await compare();
  $("result").dataset.done = String(Number($("result").dataset.done || 0) + 1);
  stage(`Done in ${seconds.toFixed(1)} seconds`, 1);
  $("result").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

function facts(made, seconds, isShown) {
  const { blob } = made;
  const listed = [
    ["Time", `${seconds.toFixed(2)} s`],
    ["Model time", made.modelSeconds ? `${made.modelSeconds.toFixed(2)} s` : ""],
    ["Size", `${made.pictureSize} → ${made.size}`.replaceAll("x", " × ")],
    ["File", blob.size < 1e6 ? `${(blob.size / 1e3).toFixed(0)} kB` : `${(blob.size / 1e6).toFixed(1)} MB`],
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

$("file").addEventListener("change", () => { take($("file").files[0]); $("file").value = ""; });
$("options").addEventListener("submit", (event) => { event.preventDefault(); if (current) upscale(); });
$("format").addEventListener("change", () => { $("quality-field").hidden = !["jpeg", "webp", "avif", "jxl"].includes($("format").value); });
$("model").addEventListener("change", paint);
$("clear").addEventListener("click", () => hole.clear());
$("key").addEventListener("change", learn);
$("cancel").addEventListener("click", () => cancel("Cancelled."));
for (const radio of document.querySelectorAll("[name=against]")) radio.addEventListener("change", compare);
$("zoom-in").addEventListener("click", () => view.zoom(1.5, $("view").clientWidth / 2, $("view").clientHeight / 2));
$("zoom-out").addEventListener("click", () => view.zoom(1 / 1.5, $("view").clientWidth / 2, $("view").clientHeight / 2));
$("fit").addEventListener("click", () => view.fit());
$("actual").addEventListener("click", () => view.actual());
document.addEventListener("paste", (event) => take([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
let depth = 0; // dragenter and dragleave fire for every element that the pointer crosses
document.addEventListener("dragenter", (event) => { event.preventDefault(); depth++; $("drop").classList.add("over"); });
document.addEventListener("dragleave", () => { if (!--depth) $("drop").classList.remove("over"); });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
learn().catch(() => complain("The server cannot be reached."));
watch();
