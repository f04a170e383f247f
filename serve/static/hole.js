// The hole of a picture, drawn with a brush over it.

const BRUSH = 1 / 16; // of the longer side: diameter of the thickest brush
const SHOWN = "#ff2d55"; // the page shows the layer half transparent

export class Hole {
  constructor(picture, layer, size) {
    this.picture = picture;
    this.layer = layer;
    this.size = size;
    this.isEmpty = true;
    this.last = null;
    layer.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      layer.setPointerCapture(event.pointerId);
      this.last = this.at(event);
      this.stroke(event);
    });
    layer.addEventListener("pointermove", (event) => { if (this.last) this.stroke(event); });
    for (const name of ["pointerup", "pointercancel"]) layer.addEventListener(name, () => { this.last = null; });
  }

  show(image) {
    for (const canvas of [this.picture, this.layer]) {
      canvas.width = image.width;
      canvas.height = image.height;
    }
    this.picture.getContext("2d").drawImage(image, 0, 0);
    this.clear();
  }

  clear() {
    this.layer.getContext("2d").clearRect(0, 0, this.layer.width, this.layer.height);
    this.isEmpty = true;
  }

  at(event) {
    const box = this.layer.getBoundingClientRect();
    return [((event.clientX - box.left) * this.layer.width) / box.width, ((event.clientY - box.top) * this.layer.height) / box.height];
  }

  stroke(event) {
    const to = this.at(event);
    const context = this.layer.getContext("2d");
    context.lineCap = context.lineJoin = "round";
    context.strokeStyle = SHOWN;
    context.lineWidth = Math.max(1, (this.size.value / 100) * BRUSH * 2 * Math.max(this.layer.width, this.layer.height));
    context.beginPath();
    context.moveTo(...this.last);
    context.lineTo(...to);
    context.stroke();
    this.last = to;
    this.isEmpty = false;
  }

  // The mask: white in the hole, black elsewhere.
  mask() {
    const { width, height } = this.layer;
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d");
    context.drawImage(this.layer, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    return canvas.convertToBlob({ type: "image/png" });
  }
}
