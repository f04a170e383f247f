// Pictures on canvases: decoded, drawn, enlarged for comparison, blended.

export async function picture(blob) {
  try {
    return await createImageBitmap(blob);
  } catch {
    return null; // a format that this browser cannot display
  }
}

export function draw(canvas, image, width, height) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(image, 0, 0, width, height);
}

export function put(canvas, pixels) {
  canvas.width = pixels.width;
  canvas.height = pixels.height;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

export function pixelsOf(image) {
  const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
}

// (1 - share) a + share b, as the server mixes the two; the ends are a and b themselves.
export function blend(a, b, share) {
  const mixed = new ImageData(a.width, a.height);
  for (let i = 0; i < mixed.data.length; i++) mixed.data[i] = a.data[i] + share * (b.data[i] - a.data[i]); // rounds
  return mixed;
}

export function bicubic(image, width, height) {
  const { data } = pixelsOf(image);
  const worker = new Worker("/static/bicubic.js");
  return new Promise((resolve, reject) => {
    worker.onmessage = ({ data: made }) => { worker.terminate(); resolve(new ImageData(made.data, made.width, made.height)); };
    worker.onerror = () => { worker.terminate(); reject(new Error("bicubic failed")); };
    worker.postMessage({ width: image.width, height: image.height, data, outWidth: width, outHeight: height }, [data.buffer]);
  });
}
