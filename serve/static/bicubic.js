// Bicubic interpolation (Keys, a = -0.5) for comparison, in a worker so that the page stays responsive.
// In: {width, height, data, outWidth, outHeight}, RGBA bytes. Out: {width, height, data}.

function weight(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

// The inputs and weights of every output position. For downscaling the kernel is widened, which avoids aliasing.
function taps(from, to) {
  const scale = from / to, reach = Math.max(1, scale), table = [];
  for (let i = 0; i < to; i++) {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.floor(centre - 2 * reach + 0.5)), last = Math.min(from, Math.floor(centre + 2 * reach + 0.5));
    const weights = [];
    let sum = 0;
    for (let j = first; j < last; j++) { const w = weight((j + 0.5 - centre) / reach); weights.push(w); sum += w; }
    table.push([first, weights.map((w) => w / sum)]);
  }
  return table;
}

function resize({ width, height, data, outWidth, outHeight }) {
  const across = taps(width, outWidth), down = taps(height, outHeight);
  const rows = new Float32Array(outWidth * height * 4);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < outWidth; x++) {
      const [first, weights] = across[x];
      let r = 0, g = 0, b = 0, a = 0;
      for (let k = 0, p = (y * width + first) * 4; k < weights.length; k++, p += 4) {
        const w = weights[k];
        r += w * data[p]; g += w * data[p + 1]; b += w * data[p + 2]; a += w * data[p + 3];
      }
      const q = (y * outWidth + x) * 4;
      rows[q] = r; rows[q + 1] = g; rows[q + 2] = b; rows[q + 3] = a;
    }
  }
  const out = new Uint8ClampedArray(outWidth * outHeight * 4), sums = new Float32Array(outWidth * 4);
  for (let y = 0; y < outHeight; y++) {
    const [first, weights] = down[y];
    sums.fill(0);
    for (let k = 0; k < weights.length; k++) {
      const w = weights[k], from = (first + k) * outWidth * 4;
      for (let i = 0; i < sums.length; i++) sums[i] += w * rows[from + i];
    }
    out.set(sums, y * outWidth * 4); // rounds and clamps
  }
  return { width: outWidth, height: outHeight, data: out };
}

onmessage = ({ data: job }) => {
  const result = resize(job);
  postMessage(result, [result.data.buffer]);
};
