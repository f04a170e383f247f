// ZIP files whose entries are stored as they are: pictures are compressed already.

const LARGEST = 2 ** 32; // beyond it the format needs other fields
const CRC = Uint32Array.from({ length: 256 }, (_, value) => {
  for (let i = 0; i < 8; i++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

function checksum(bytes) {
  let value = ~0;
  for (const byte of bytes) value = CRC[(value ^ byte) & 255] ^ (value >>> 8);
  return ~value >>> 0;
}

// Pairs of width and value, little-endian.
function packed(...fields) {
  const view = new DataView(new ArrayBuffer(fields.reduce((sum, [width]) => sum + width, 0)));
  let at = 0;
  for (const [width, value] of fields) {
    if (width === 2) view.setUint16(at, value, true);
    else view.setUint32(at, value, true);
    at += width;
  }
  return view;
}

// Names that are taken get a number: "a.png", "a (2).png".
function unlike(names) {
  const taken = new Set();
  return names.map((name) => {
    const [, stem, end] = name.match(/^(.*?)(\.[^.]*)?$/s);
    let free = name;
    for (let i = 2; taken.has(free); i++) free = `${stem} (${i})${end ?? ""}`;
    taken.add(free);
    return free;
  });
}

// Put [{name, blob}] into a ZIP file.
export async function zipped(entries) {
  const parts = [], directory = [], names = unlike(entries.map(({ name }) => name.replace(/[\\/]/g, "_")));
  let at = 0;
  for (const [i, { blob }] of entries.entries()) {
    const name = new TextEncoder().encode(names[i]);
    const sum = checksum(new Uint8Array(await blob.arrayBuffer()));
    // Version 2.0, name in UTF-8, stored, 1980-01-01: there is no other date to tell.
    const common = [[2, 20], [2, 0x800], [2, 0], [2, 0], [2, 33], [4, sum], [4, blob.size], [4, blob.size], [2, name.length], [2, 0]];
    directory.push(packed([4, 0x02014b50], [2, 20], ...common, [2, 0], [2, 0], [2, 0], [4, 0], [4, at]), name);
    parts.push(packed([4, 0x04034b50], ...common), name, blob);
    at += 30 + name.length + blob.size;
  }
  const size = directory.reduce((sum, part) => sum + part.byteLength, 0);
  if (at + size >= LARGEST || entries.length >= 65535) throw new Error("together they are larger than a ZIP file may be, 4 GB: save them one by one");
  const end = packed([4, 0x06054b50], [2, 0], [2, 0], [2, entries.length], [2, entries.length], [4, size], [4, at], [2, 0]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

// Take [{name, blob}] out of a ZIP file whose entries are stored, without a comment at its end.
export async function unzipped(file, type) {
  const view = new DataView(await file.arrayBuffer());
  const end = view.byteLength - 22, entries = [];
  let at = view.getUint32(end + 16, true);
  for (let i = view.getUint16(end + 10, true); i > 0; i--) {
    const [size, length, further] = [view.getUint32(at + 20, true), view.getUint16(at + 28, true), view.getUint16(at + 30, true) + view.getUint16(at + 32, true)];
    const local = view.getUint32(at + 42, true);
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const name = new TextDecoder().decode(new Uint8Array(view.buffer, at + 46, length));
    entries.push({ name, blob: file.slice(start, start + size, type) });
    at += 46 + length + further;
  }
  return entries;
}
