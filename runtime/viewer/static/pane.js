// One slide with the labels of one run over it, and a scale bar.

/* global OpenSeadragon */
import { LabelTiles, NONE, address } from "./labels.js";

const CRISP = 2; // screen pixels per slide pixel from which slide pixels are shown as squares
const DIFFERENT = packed("#ff00ff");
const OUTLINE = packed("#000000"); // of the analysed area, on the pixels beside it
const BAR_PX = 140; // the scale bar is not longer

export class Pane {
  /**
   * @param {HTMLElement} element container, at its final size
   * @param {object} run answer of the server at /api/run
   * @param {object} on called with the pane: moved(), clicked(x, y) in pixels of level 0, touched()
   */
  constructor(element, run, on) {
    this.on = on;
    this.run = run;
    this.palette = new Uint32Array(256);
    this.opacity = 1;
    this.other = null; // the pane to which labels are compared
    this.density = null; // shown instead of the labels
    this.high = 0; // the density with the last colour
    this.element = element;
    this.element.ariaLabel = `${run.name} of ${run.in}`;
    this.element.innerHTML =
      '<div class="slide"></div><canvas class="labels" aria-hidden="true"></canvas>' +
      '<p class="caption"></p><div class="scale" role="img"><i></i><span></span></div>';
    [this.slide, this.canvas, this.caption, this.scale] = this.element.children;
    this.context = this.canvas.getContext("2d");
    this.labels = new LabelTiles(run, () => this.repaint());
    const { image } = run;
    this.width = image?.width ?? run.width * run.downsample;
    this.height = image?.height ?? run.height * run.downsample;
    this.viewer = new OpenSeadragon.Viewer({
      element: this.slide,
      drawer: "canvas",
      showNavigationControl: false,
      animationTime: matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.4,
      springStiffness: 10,
      maxZoomPixelRatio: 32,
      minZoomImageRatio: 0.5,
      visibilityRatio: 0.2,
      preserveImageSizeOnResize: true,
      smoothTileEdgesMinZoom: Infinity, // tiles overlap; it would leave the last pixels blank
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { clickToZoom: false },
      gestureSettingsPen: { clickToZoom: false },
      tileSources: this.tileSource(),
    });
    this.viewer.canvas.ariaLabel = "Slide; arrows move, plus and minus zoom, Enter reads the centre";
    this.viewer.addHandler("canvas-key", (event) => {
      event.preventDefaultAction = true; // the page handles keys itself
    });
    this.viewer.addHandler("canvas-click", (event) => {
      if (!event.quick) return;
      const point = this.viewer.viewport.viewerElementToImageCoordinates(event.position);
      on.clicked(this, point.x, point.y);
    });
    for (const name of ["canvas-press", "canvas-scroll", "canvas-focus", "canvas-pinch"]) {
      this.viewer.addHandler(name, () => on.touched(this));
    }
    this.viewer.addHandler("update-viewport", () => {
      this.paint();
      on.moved(this);
    });
    this.opened = new Promise((done) => this.viewer.addOnceHandler("open", done));
    this.update(run);
  }

  /** Take a new answer of the server. */
  update(run) {
    if (run.image && !this.run.image) {
      this.run = run;
      this.viewer.open(this.tileSource());
    }
    this.run = run;
    this.labels.update(run);
    this.caption.textContent = `${run.in} / ${run.name}`;
    this.repaint();
  }

  /** @param {{color: string, shown: boolean}[]} classes of each label */
  colour(classes) {
    this.palette.fill(0);
    classes.forEach(({ color, shown }, label) => {
      if (shown) this.palette[label] = packed(color);
    });
    this.repaint();
  }

  /** Whether the area that a finished run analysed is outlined. */
  outline(shown) {
    this.outlined = shown;
    this.repaint();
  }

  fade(opacity) {
    this.canvas.style.opacity = opacity;
  }

  /** Show where labels differ from another pane's, or all labels if it is null. */
  compareWith(other) {
    this.other = other;
    this.repaint();
  }

  /** Show a density map, up to a value that has the last colour; null: the labels. */
  showDensity(density, high) {
    Object.assign(this, { density, high });
    this.repaint();
  }

  /** The centre in pixels of level 0, and screen pixels per pixel of level 0. */
  get place() {
    const { viewport } = this.viewer;
    const middle = viewport.getCenter(true);
    const zoom = (viewport.getZoom(true) * viewport.getContainerSize().x) / this.width;
    return { x: middle.x * this.width, y: middle.y * this.width, zoom };
  }

  goTo({ x, y, zoom }) {
    const { viewport } = this.viewer;
    viewport.zoomTo((zoom * this.width) / viewport.getContainerSize().x, null, true);
    viewport.panTo(new OpenSeadragon.Point(x / this.width, y / this.width), true);
  }

  move(across, down) {
    const { viewport } = this.viewer;
    const { x, y } = viewport.getContainerSize();
    viewport.panBy(viewport.deltaPointsFromPixels(new OpenSeadragon.Point(across * x, down * y)));
    viewport.applyConstraints();
  }

  zoomBy(factor) {
    this.viewer.viewport.zoomBy(factor);
    this.viewer.viewport.applyConstraints();
  }

  home() {
    this.viewer.viewport.goHome();
  }

  mark(x, y) {
    this.marker ??= Object.assign(document.createElement("div"), { className: "marker" });
    const location = new OpenSeadragon.Point(x / this.width, y / this.width);
    this.viewer.removeOverlay(this.marker);
    this.viewer.addOverlay({ element: this.marker, location, placement: "CENTER" });
  }

  close() {
    this.viewer.destroy();
    this.element.remove();
    this.closed = true;
  }

  tileSource() {
    const { image, key, version } = this.run;
    if (!image) {
      const size = { width: this.width, height: this.height };
      return { ...size, tileSize: 512, minLevel: 0, maxLevel: 0, getTileUrl: () => "", tileExists: () => false };
    }
    return {
      width: image.width,
      height: image.height,
      tileSize: image.tile_px,
      tileOverlap: image.overlap_px,
      minLevel: 0,
      maxLevel: image.levels - 1,
      getTileUrl: (level, x, y) => `tiles/slide/${address(key)}/${level}/${x}/${y}?v=${version}`,
    };
  }

  repaint() {
    if (this.waiting || this.closed) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      if (!this.closed && this.viewer.isOpen()) this.paint();
    });
  }

  paint() {
    const { viewport } = this.viewer;
    const size = viewport.getContainerSize();
    const dense = devicePixelRatio;
    const [width, height] = [Math.round(size.x * dense), Math.round(size.y * dense)];
    if (!width || !height) return;
    if (this.canvas.width !== width || this.canvas.height !== height) {
      Object.assign(this.canvas, { width, height });
      Object.assign(this.canvas.style, { width: `${size.x}px`, height: `${size.y}px` });
    }
    const bounds = viewport.getBounds(true);
    const scale = (bounds.width * this.width) / (size.x * dense);
    const view = { left: bounds.x * this.width, top: bounds.y * this.width, scale, width, height };
    const crisp = 1 / scale >= CRISP;
    if (crisp !== this.crisp) {
      this.crisp = crisp;
      this.viewer.drawer.setImageSmoothingEnabled(!crisp);
    }
    const image = this.context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const labels = this.labels.sample(view);
    if (this.density) this.density.paint(view, pixels, this.high);
    else if (this.other) this.paintDifferences(labels, this.other.labels.sample(view), pixels);
    else for (let i = 0; i < labels.length; i++) pixels[i] = this.palette[labels[i]];
    if (this.outlined && this.run.progress === 1) this.paintOutline(labels, view, pixels);
    this.context.putImageData(image, 0, 0);
    this.showScale(1 / (scale * dense));
  }

  paintOutline(labels, { left, top, scale, width, height }, pixels) {
    const { run } = this;
    const inside = (start, size, count) => [
      Math.max(0, Math.ceil(-start / scale - 0.5)),
      Math.min(count, Math.ceil((size * run.downsample - start) / scale - 0.5)), // the slide's border is no outline
    ];
    const [x0, x1] = inside(left, run.width, width);
    const [y0, y1] = inside(top, run.height, height);
    for (let y = y0; y < y1; y++) {
      for (let x = x0; x < x1; x++) {
        const i = y * width + x;
        if (labels[i] !== NONE) continue;
        const beside =
          (x > x0 && labels[i - 1] !== NONE) ||
          (x + 1 < x1 && labels[i + 1] !== NONE) ||
          (y > y0 && labels[i - width] !== NONE) ||
          (y + 1 < y1 && labels[i + width] !== NONE);
        if (beside) pixels[i] = OUTLINE;
      }
    }
  }

  paintDifferences(labels, others, pixels) {
    // Two models may number their classes differently: classes are compared by name.
    const names = [this.run, this.other.run].map((run) => run.classes.map(({ name }) => name));
    const same = Array.from({ length: 256 }, (_, label) => {
      const found = names[1].indexOf(names[0][label] ?? null);
      return found < 0 ? -1 : found;
    });
    for (let i = 0; i < labels.length; i++) {
      const both = labels[i] !== NONE && others[i] !== NONE;
      if (both && same[labels[i]] !== others[i]) pixels[i] = DIFFERENT;
    }
  }

  showScale(zoom) {
    const um = this.run.mpp / this.run.downsample / zoom; // per pixel of the page
    const most = BAR_PX * um;
    const power = 10 ** Math.floor(Math.log10(most));
    const length = [5, 2, 1].find((n) => n * power <= most) * power;
    const [bar, text] = this.scale.children;
    bar.style.width = `${length / um}px`;
    text.textContent = length >= 1000 ? `${tidy(length / 1000)} mm` : `${tidy(length)} µm`;
    this.scale.ariaLabel = `Scale bar: ${text.textContent}`;
  }
}

function tidy(value) {
  return String(Number(value.toPrecision(3)));
}

/** "#rrggbb" as the bytes red, green, blue, opaque of an image. */
function packed(color) {
  const value = Number.parseInt(color.slice(1), 16);
  const bytes = [value >> 16, (value >> 8) & 255, value & 255, 255];
  return new Uint32Array(Uint8Array.from(bytes).buffer)[0];
}
