// The request on the stage as text to take away: curl and Python. Both name an environment variable for the key.

const KEY_VARIABLE = "FASTLIGHTGEN_KEY";

/**
 * What to run in a shell. It answers with the job, its `video_url` in it.
 *
 * @param ask {source: "image", "video" or "none", file: its name, strength: or null, prompt, seed: or null, models: names,
 *   origin, hasKey}
 */
export function curl({ source, file, strength, prompt, seed, models, origin, hasKey }) {
  const several = models.length > 1;
  const parts = [
    `curl -sS ${shell(`${origin}/generate`)}`,
    ...(hasKey ? [`-H "Authorization: Bearer $${KEY_VARIABLE}"`] : []),
    `-H 'Prefer: wait=60'`,
    ...(file ? [`-F ${shell(`${source}=@${curlFile(file)}`)}`] : []),
    ...(strength === null ? [] : [`--form-string strength=${strength}`]),
    `--form-string ${shell(`prompt=${prompt}`)}`,
    ...(seed === null ? [] : [`--form-string seed=${seed}`]),
    ...(several ? ['--form-string "model=$model"'] : models.map((name) => `--form-string ${shell(`model=${name}`)}`)),
  ];
  if (!several) return parts.join(" \\\n  ");
  return `for model in ${models.map(shell).join(" ")}; do\n  ${parts.join(" \\\n    ")}\n  echo\ndone`;
}

/** A whole program, with httpx: it keeps the video beside itself. `ask` as above. */
export function python({ source, file, strength, prompt, seed, models, origin, hasKey }) {
  const several = models.length > 1;
  const fields = [`"prompt": ${literal(prompt)}`];
  if (strength !== null) fields.push(`"strength": ${strength}`);
  if (seed !== null) fields.push(`"seed": ${seed}`);
  if (models.length) fields.push(`"model": ${several ? "model" : literal(models[0])}`);
  const work = [
    "fields = {",
    ...fields.map((field) => `    ${field},`),
    "}",
    "answer = client.post(",
    `    "/generate",`,
    "    data=fields,",
    ...(file ? [`    files={"${source}": ${source}},`] : []),
    `    headers={"Prefer": "wait=60"},`,
    ")",
    "if answer.is_error:",
    "    raise SystemExit(answer.text)",
    "job = answer.json()",
    `while job["status"] in ("queued", "running", "cancelling"):`,
    "    time.sleep(1)",
    `    job = client.get(f"/generate/{job['id']}").json()`,
    `if job["status"] != "succeeded":`,
    `    raise SystemExit(f"{job['status']}: {job['error']}")`,
    `video = Path(f"{job['model']}-{job['seed']}.mp4")`,
    `video.write_bytes(client.get(job["video_url"]).content)`,
    "print(video)",
  ];
  return [
    ...(hasKey ? ["import os"] : []),
    "import time",
    "from pathlib import Path",
    "",
    "import httpx",
    "",
    "client = httpx.Client(",
    `    base_url=${literal(origin)},`,
    ...(hasKey ? [`    headers={"Authorization": f"Bearer {os.environ['${KEY_VARIABLE}']}"},`] : []),
    "    follow_redirects=True,",
    "    timeout=90,",
    ")",
    ...(file ? [`${source} = Path(${literal(file)}).read_bytes()`] : []),
    ...(several ? [`for model in [${models.map(literal).join(", ")}]:`] : []),
    ...work.map((line) => (several ? `    ${line}` : line)),
    "",
  ].join("\n");
}

/** One word of a POSIX shell. */
const shell = (text) => (/^[\w.:/@=-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** A file's name as curl reads it after `@`: some letters would end it. */
const curlFile = (name) => (/[,;"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name);

/** A JSON string is a Python string. */
const literal = (text) => JSON.stringify(text);
