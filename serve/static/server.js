// One picture and the endpoint: sent, looked after as a job where it may take long, cancelled.

const TRIES = 5; // while the server is busy
const LONGEST_WAIT_S = 30;

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

export class Asked {
  // `headers` go with every request; `tell(text, share)` is told how it stands, share null where nobody knows.
  constructor(headers, tell) {
    this.headers = headers;
    this.tell = tell;
    this.isOver = false;
  }

  cancel() {
    this.isOver = true; // first: what follows from the end of a request that is not wanted is not shown
    if (this.job) this.forget(this.job);
    else if (!this.isSent) this.sent?.abort(); // else its answer names the job that is to be forgotten
  }

  forget(job) {
    return fetch(`/v1/jobs/${job}`, { method: "DELETE", headers: this.headers }).catch(() => {});
  }

  // Return what the server made of a body, or null when somebody cancelled it.
  async run(body, parameters, isJob) {
    for (let i = 1; ; i++) {
      const sent = await this.send(body, parameters, isJob);
      if (this.isOver) {
        if (sent.status === 202) this.forget(JSON.parse(await sent.response.text()).id);
        return null;
      }
      if (sent.status === 202) return this.finished(sent);
      if (sent.status === 200) return told(sent);
      const wait = Number(sent.getResponseHeader("Retry-After"));
      if (![429, 503].includes(sent.status) || !wait || wait > LONGEST_WAIT_S || i === TRIES) throw await refusal(sent);
      this.tell("The server is busy", null);
      await pause(wait);
      if (this.isOver) return null;
    }
  }

  send(body, parameters, isJob) {
    const sent = (this.sent = new XMLHttpRequest());
    this.isSent = false;
    this.tell("Sending", 0);
    sent.open("POST", `/v1/upscale?${parameters}`);
    sent.responseType = "blob";
    for (const [name, value] of Object.entries(this.headers)) sent.setRequestHeader(name, value);
    if (!(body instanceof FormData)) sent.setRequestHeader("Content-Type", "application/octet-stream");
    if (isJob) sent.setRequestHeader("Prefer", "respond-async");
    sent.upload.onprogress = (event) => this.tell("Sending", event.loaded / event.total);
    sent.upload.onload = () => {
      this.isSent = isJob;
      this.tell("Upscaling", null);
    };
    sent.onprogress = (event) => { if (sent.status === 200) this.tell("Receiving", event.lengthComputable ? event.loaded / event.total : null); };
    return new Promise((resolve) => {
      sent.onloadend = () => resolve(sent);
      sent.send(body);
    });
  }

  // Wait for a job.
  async finished(sent) {
    let job = JSON.parse(await sent.response.text());
    if (this.isOver) { // cancelled while the answer that names the job was read
      this.forget(job.id);
      return null;
    }
    this.job = job.id;
    const ask = (path) => fetch(`/v1/jobs/${job.id}${path}`, { headers: this.headers });
    while (job.state === "queued" || job.state === "running") {
      this.tell(job.state === "queued" ? "Waiting for its turn" : "Upscaling", null);
      await pause(0.5);
      if (this.isOver) return null;
      const answer = await ask("");
      if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
      job = await answer.json();
    }
    if (this.isOver) return null;
    if (job.state !== "complete") throw new Error(job.message || `the job is ${job.state}`);
    const blob = await (await ask("/result")).blob();
    this.forget(job.id); // the picture is here
    this.job = null;
    if (this.isOver) return null;
    const [from, to] = job.result.sizes;
    const kind = blob.type.replace(/^.*\//, "");
    const name = `picture_x${Number((to[0] / from[0]).toPrecision(3))}${kind === "zip" ? "_steps" : ""}.${kind === "jpeg" ? "jpg" : kind}`;
    return { blob, pictureSize: from.join("x"), size: to.join("x"), model: "", notes: job.result.notes.join("; "), name, modelSeconds: job.result.seconds.model };
  }
}

function told(sent) {
  const [pictureSize, size] = [sent.getResponseHeader("X-Picture-Size"), sent.getResponseHeader("X-Result-Size")];
  const timing = Object.fromEntries((sent.getResponseHeader("Server-Timing") || "").split(", ").map((one) => one.split(";dur=")));
  const name = decodeURIComponent((sent.getResponseHeader("Content-Disposition") || "").split("''")[1] || "picture.png");
  const [model, notes] = ["X-Model", "X-Notes"].map((header) => decodeURIComponent(sent.getResponseHeader(header) || ""));
  return { blob: sent.response, pictureSize, size, model, notes, name, modelSeconds: timing.model && timing.model / 1000 };
}

// The error that says why there is no result; `status` is 0 when the server could not be reached.
async function refusal(sent) {
  let text = sent.status ? `The server answered ${sent.status}.` : "The server cannot be reached.";
  try {
    const problem = JSON.parse(await sent.response.text());
    text = `${problem.title}: ${problem.detail}`;
  } catch { /* a proxy's page instead of problem details: only the status is known */ }
  const wait = sent.getResponseHeader("Retry-After");
  return Object.assign(new Error(wait ? `${text} (try again in ${wait} s)` : text), { status: sent.status });
}
