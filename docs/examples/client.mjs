// Ask a server about texts, and wait politely if it is overloaded:
//
//   node docs/examples/client.mjs http://127.0.0.1:8000 "a text" "another text"

const [server, ...texts] = process.argv.slice(2);

async function classify(inputs, tries = 5) {
  const headers = { "content-type": "application/json" };
  if (process.env.API_KEY) headers.authorization = `Bearer ${process.env.API_KEY}`;
  for (let attempt = 0; attempt < tries; attempt++) {
    const answer = await fetch(`${server}/v1/predict`, { method: "POST", headers, body: JSON.stringify({ inputs }) });
    if (answer.status === 429 || answer.status === 503) {
      const seconds = Number(answer.headers.get("retry-after") ?? 1);
      await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
      continue;
    }
    const content = await answer.json();
    if (!answer.ok) throw new Error(`${answer.status}: ${content.error}`);
    return content.predictions;
  }
  throw new Error(`the server was overloaded ${tries} times`);
}

for (const [place, found] of (await classify(texts)).entries()) {
  const label = found.label ?? found.labels?.join(", ") ?? found.value;
  console.log(`${label}\t${JSON.stringify(found.scores)}\t${texts[place].slice(0, 60)}`);
}
