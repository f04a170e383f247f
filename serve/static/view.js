// Two pictures of equal size on top of each other, with a divider, zoom and pan.

const LARGEST = 32;

export class View {
  constructor(stage, split) {
    this.stage = stage;
    this.split = split;
    this.after = stage.querySelector("#after");
    this.before = stage.querySelector("#before");
    this.layer = stage.querySelector("#before-layer");
    this.divider = stage.querySelector("#divider");
    this.scale = 1;
    this.x = this.y = 0;
    this.isFitted = true;
    this.pointers = new Map();
    split.addEventListener("input", () => this.draw());
    stage.addEventListener("wheel", (event) => {
      event.preventDefault();
      const box = stage.getBoundingClientRect();
      this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
    stage.addEventListener("pointerdown", (event) => this.down(event));
    stage.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) stage.addEventListener(name, (event) => this.up(event));
    stage.addEventListener("dblclick", () => (this.isFitted ? this.actual() : this.fit()));
    stage.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => (this.isFitted ? this.fit() : this.draw())).observe(stage);
  }

  show(width, height) {
    this.width = width;
    this.height = height;
    this.fit();
  }

  fit() {
    if (!this.width) return;
    const { clientWidth, clientHeight } = this.stage;
    this.scale = this.smallest();
    this.x = (clientWidth - this.width * this.scale) / 2;
    this.y = (clientHeight - this.height * this.scale) / 2;
    this.isFitted = true;
    this.draw();
  }

  smallest() {
    return Math.min(this.stage.clientWidth / this.width, this.stage.clientHeight / this.height);
  }

  actual() {
    // One pixel of the result per screen pixel.
    this.zoom(1 / devicePixelRatio / this.scale, this.stage.clientWidth / 2, this.stage.clientHeight / 2);
  }

  zoom(factor, x, y) {
    const scale = Math.min(LARGEST, Math.max(Math.min(1, this.smallest()), this.scale * factor));
    this.x = x - (x - this.x) * (scale / this.scale);
    this.y = y - (y - this.y) * (scale / this.scale);
    this.scale = scale;
    this.isFitted = false;
    this.draw();
  }

  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.isFitted = false;
    this.draw();
  }

  down(event) {
    if (event.button) return;
    this.stage.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, event);
    this.stage.classList.add("dragging");
    const edge = (this.split.value / 100) * this.stage.clientWidth;
    const at = event.clientX - this.stage.getBoundingClientRect().left;
    // A drag near the divider, or anywhere on a fitted picture, moves the divider; otherwise it moves the picture.
    this.isSplitting = this.pointers.size === 1 && (this.isFitted || Math.abs(at - edge) < 24);
    if (this.isSplitting) this.splitAt(at);
  }

  move(event) {
    const last = this.pointers.get(event.pointerId);
    if (!last) return;
    const box = this.stage.getBoundingClientRect();
    if (this.pointers.size === 2) {
      const other = [...this.pointers.values()].find((one) => one.pointerId !== event.pointerId);
      const distance = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY) || 1;
      this.zoom(distance(event) / distance(last), (event.clientX + other.clientX) / 2 - box.left, (event.clientY + other.clientY) / 2 - box.top);
    } else if (this.isSplitting) {
      this.splitAt(event.clientX - box.left);
    } else {
      this.pan(event.clientX - last.clientX, event.clientY - last.clientY);
    }
    this.pointers.set(event.pointerId, event);
  }

  up(event) {
    this.pointers.delete(event.pointerId);
    this.isSplitting = false;
    if (!this.pointers.size) this.stage.classList.remove("dragging");
  }

  splitAt(x) {
    this.split.value = (100 * x) / this.stage.clientWidth;
    this.draw();
  }

  key(event) {
    const [x, y] = [this.stage.clientWidth / 2, this.stage.clientHeight / 2];
    const acts = {
      "+": () => this.zoom(1.25, x, y), "=": () => this.zoom(1.25, x, y), "-": () => this.zoom(0.8, x, y), 0: () => this.fit(), 1: () => this.actual(),
      ArrowLeft: () => this.pan(48, 0), ArrowRight: () => this.pan(-48, 0), ArrowUp: () => this.pan(0, 48), ArrowDown: () => this.pan(0, -48),
    };
    if (!acts[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    acts[event.key]();
  }

  draw() {
    if (!this.width) return;
    // The picture can be moved, but never out of view.
    const { clientWidth, clientHeight } = this.stage;
    const keep = (at, length, room) => Math.min(Math.max(at, Math.min(room - length, room / 2 - length)), Math.max(0, room / 2));
    this.x = this.isFitted ? this.x : keep(this.x, this.width * this.scale, clientWidth);
    this.y = this.isFitted ? this.y : keep(this.y, this.height * this.scale, clientHeight);
    for (const canvas of [this.after, this.before]) {
      const scale = (this.scale * this.width) / (canvas.width || 1);
      canvas.style.transform = `translate(${this.x}px, ${this.y}px) scale(${scale})`;
      canvas.classList.toggle("crisp", scale * devicePixelRatio > 1.5);
    }
    this.layer.style.clipPath = `inset(0 ${100 - this.split.value}% 0 0)`;
    this.divider.style.left = `${this.split.value}%`;
    this.split.setAttribute("aria-valuetext", `${Math.round(this.split.value)} % ${document.querySelector("#tag-before").textContent}, the rest ours`);
  }
}
