// An image and a sentence in, an MP4 out, with node 18 or newer and no packages:
//   node examples/generate.mjs models/examples/red-circle.png "a red circle moves right quickly, static camera"
import { randomUUID } from "node:crypto";
import { readFile, writeFile } from "node:fs/promises";
import { resolve } from "node:path";

const [image, prompt] = process.argv.slice(2);
const url = process.env.FASTLIGHTGEN_URL ?? "http://127.0.0.1:8000";
const key = process.env.FASTLIGHTGEN_KEY;
const identity = key ? { Authorization: `Bearer ${key}` } : {};
const sleep = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

/** The job. However often the request is sent, it is one: each try has the same Idempotency-Key. */
async function submit() {
  const body = new FormData();
  body.set("image", new Blob([await readFile(image)]));
  body.set("prompt", prompt);
  const headers = { ...identity, "Idempotency-Key": randomUUID() };
  for (let attempt = 0; ; attempt += 1) {
    const answer = await fetch(`${url}/generate`, { method: "POST", body, headers }).catch((error) => error);
    if (answer.ok) return answer.json();
    const isAnswer = answer instanceof Response;
    const retryAfter = isAnswer ? answer.headers.get("Retry-After") : null;
    // A refusal that may be another one later says when: the rest is for good.
    const isFinal = isAnswer && answer.status < 500 && retryAfter === null;
    if (isFinal || attempt === 5) throw new Error(isAnswer ? await answer.text() : String(answer.cause ?? answer));
    await sleep(Number(retryAfter ?? 2 ** attempt));
  }
}

/** The events of one connection, each as { id, event, data }: fields, and an empty line at the end of each. */
async function* events(address, lastId) {
  const headers = { ...identity, ...(lastId && { "Last-Event-ID": lastId }) };
  const answer = await fetch(address, { headers });
  if (answer.status >= 500) return; // the next connection may be luckier
  if (!answer.ok) throw new Error(await answer.text());
  let text = "";
  for await (const part of answer.body.pipeThrough(new TextDecoderStream())) {
    const blocks = (text + part).split("\r\n\r\n");
    text = blocks.pop();
    for (const block of blocks) {
      const event = Object.fromEntries(block.split("\r\n").map((line) => line.split(/: (.*)/s, 2)));
      if (event.data) yield event;
    }
  }
}

/** The job once it is over. A connection that breaks is made again, after the last event that came. */
async function follow(job) {
  let lastId;
  const isUnderWay = () => ["queued", "running", "cancelling"].includes(job.status);
  while (isUnderWay()) {
    try {
      for await (const event of events(job.links.events, lastId)) {
        lastId = event.id;
        job = JSON.parse(event.data);
        console.error(`${job.status} ${Math.round(100 * job.progress)}%`);
      }
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // which is what `fetch` throws for a connection
    }
    if (isUnderWay()) await sleep(2);
  }
  return job;
}

const job = await follow(await submit());
if (job.status !== "succeeded") throw new Error(`${job.status}: ${JSON.stringify(job.error)}`);
const video = await fetch(job.video_url); // the link needs no key
if (!video.ok) throw new Error(await video.text());
const path = resolve(`${job.id}.mp4`);
await writeFile(path, Buffer.from(await video.arrayBuffer()));
console.log(path);
