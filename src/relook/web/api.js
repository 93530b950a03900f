// The server, as this page calls it: models, one streamed answer, and the same request as curl and as Python.

export const base = new URL("v1", document.baseURI).href;

// A failure as a sentence for people; `status` is HTTP's, 0 where no answer came.
export class Failure extends Error {
  constructor(message, status = 0) {
    const said = message.trim();
    super(said[0].toUpperCase() + said.slice(1) + (/[.?!]$/.test(said) ? "" : "."));
    this.status = status;
  }
}

export async function request(path, key, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(`${base}/${path}`, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(`The server at ${base} does not answer. Is it still running?`);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const wait = response.headers.get("Retry-After");
  const sentence = said?.error?.message ?? `The server refused this with status ${response.status}.`;
  const failure = new Failure(sentence || "The request failed", response.status);
  if (wait) failure.message += ` Try again in ${wait} s.`;
  throw failure;
}

export async function models(key) {
  const found = (await (await request("models", key)).json()).data;
  return found.map((each) => ({ name: each.id, looks: [], grid: 8, domain: null, warnings: [], ...each.relook }));
}

// The JSON of every server-sent event until [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    rest += value ?? "";
    const blocks = rest.split(/\r?\n\r?\n/);
    rest = done ? "" : blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
    if (done) throw new Failure("The connection ended before the answer did. Ask again.");
  }
}

// Asks; yields {text}, {look} and at the end {result, kept, finish}.
export async function* answer(body, key, signal) {
  const response = await request("chat/completions", key, {
    method: "POST", signal, headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
  });
  try {
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Failure(chunk.error.message);
      const choice = chunk.choices?.[0];
      const text = choice?.delta?.content;
      if (text && !text.startsWith("![region look](data:image/")) yield { text }; // a server may write crops into texts
      if (chunk.relook?.look) yield { look: chunk.relook.look };
      if (choice?.finish_reason) {
        const kept = choice.delta?.relook ?? null; // what a later request carries, so that the looks stay
        yield { result: chunk.relook ?? {}, kept, finish: choice.finish_reason };
      }
    }
  } catch (error) {
    if (error instanceof Failure || error.name === "AbortError") throw error;
    throw new Failure(`The connection to ${base} was lost. Ask again.`);
  }
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`; // for a shell

// `value` as JSON, which is Python too where there is no null, true or false; the first `from` in it becomes `to`.
const literal = (value, from, to, indent) => JSON.stringify(value, null, indent).replace(JSON.stringify(from), () => to);

export function asCurl(body, image, key) {
  const here = (text) => text.replace(/[\\$`]/g, "\\$&"); // what a shell would expand in a here-document
  const text = here(JSON.stringify(body, null, 2));
  const [head] = image.url.split(",", 1);
  const data = `${head},$(base64 < ${quoted(image.name)} | tr -d '\\n')`;
  return [`curl ${base}/chat/completions -H 'Content-Type: application/json' \\`,
    ...(key ? [`  -H "Authorization: Bearer $RELOOK_API_KEY" \\`] : []),
    "  -d @- <<END", text.replace(JSON.stringify(here(image.url)), () => `"${data}"`), "END"].join("\n");
}

export function asPython(body, image, key) {
  const { model, messages, ...rest } = body;
  const [head] = image.url.split(",", 1);
  const more = rest.relook ? `,\n    extra_body=${JSON.stringify({ relook: rest.relook })}` : "";
  return `import base64
${key ? "import os\n" : ""}from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${key ? 'os.environ["RELOOK_API_KEY"]' : '"none"'})
image = base64.b64encode(Path(${JSON.stringify(image.name)}).read_bytes()).decode()
answer = client.chat.completions.create(
    model=${JSON.stringify(model)},
    messages=${literal(messages, image.url, `${JSON.stringify(`${head},`)} + image`, 4).replaceAll("\n", "\n    ")}${more},
)
print(answer.choices[0].message.content)
`;
}
