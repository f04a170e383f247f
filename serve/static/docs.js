// Builds the page of the API from /openapi.json.

const EXAMPLES = {
  "post /v1/upscale": "curl --data-binary @photo.jpg -o photo_x4.png 'HOST/v1/upscale?format=png'\ncurl -F image=@photo.jpg -F format=jpeg -F quality=90 -o photo_x4.jpg HOST/v1/upscale\ncurl -H 'Prefer: respond-async' --data-binary @photo.jpg HOST/v1/upscale",
  "get /v1/models": "curl HOST/v1/models",
  "post /v1/jobs": "curl -H 'Content-Type: application/json' -H 'Idempotency-Key: monday' \\\n  -d '{\"source\": \"s3://in/photos\", \"target\": \"s3://out/x4\"}' HOST/v1/jobs",
  "get /v1/jobs/{id}": "curl HOST/v1/jobs/ID",
  "delete /v1/jobs/{id}": "curl -X DELETE HOST/v1/jobs/ID",
  "get /v1/jobs/{id}/report": "curl -o report.html 'HOST/v1/jobs/ID/report?format=html'",
  "get /v1/jobs/{id}/result": "curl -o photo_x4.png HOST/v1/jobs/ID/result",
  "get /readyz": "curl HOST/readyz",
};

function element(name, text, className) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function kind(schema = {}) {
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.anyOf) return schema.anyOf.filter((one) => one.type !== "null").map(kind).join(" | ");
  const bounds = [schema.exclusiveMinimum !== undefined && `> ${schema.exclusiveMinimum}`, schema.minimum !== undefined && `≥ ${schema.minimum}`, schema.maximum !== undefined && `≤ ${schema.maximum}`];
  return [schema.type, ...bounds.filter(Boolean)].filter(Boolean).join(" ");
}

// Text between backticks becomes code.
function prose(text, name, className) {
  const made = element(name, "", className);
  text.split("`").forEach((part, i) => made.append(i % 2 ? element("code", part) : part));
  return made;
}

function table(rows) {
  const made = element("table");
  for (const cells of rows) {
    const row = element("tr");
    cells.forEach((cell, i) => { const td = element("td"); td.append(i ? prose(cell, "span") : element("code", cell)); row.append(td); });
    made.append(row);
  }
  return made;
}

function body(operation) {
  const schema = operation.requestBody?.content?.["application/json"]?.schema;
  return schema ? Object.entries(schema.properties).map(([name, one]) => [name, kind(one), one.description || ""]) : [];
}

const { paths } = await (await fetch("/openapi.json")).json();
for (const [path, verbs] of Object.entries(paths)) {
  for (const [verb, operation] of Object.entries(verbs)) {
    const card = element("article");
    const title = element("h2");
    title.append(element("span", verb.toUpperCase(), "verb"), element("span", path));
    card.append(title, element("p", operation.summary), prose(operation.description || "", "p", "quiet"));
    const rows = [...(operation.parameters || []).map((one) => [one.name, kind(one.schema), one.description || one.schema?.description || ""]), ...body(operation)];
    if (rows.length) card.append(table(rows));
    const example = EXAMPLES[`${verb} ${path}`];
    if (example) card.append(element("pre", example.replaceAll("HOST", location.origin)));
    document.getElementById("docs").append(card);
  }
}
