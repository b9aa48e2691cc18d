// Objects per mm² of a run as a heatmap: the grid of density.tif, fetched once per class, and looked up
// for every pixel of the screen.

import { address } from "./labels.js";

const HIGH = 0.99; // share of the cells that the scale covers; denser ones have its last colour
const ANCHORS = ["440154", "3b528b", "21918c", "5ec962", "fde725"]; // viridis
const COLOURS = Uint32Array.from({ length: 256 }, (_, i) => mixed(i / 255));
export const GRADIENT = `linear-gradient(90deg, ${ANCHORS.map((colour) => `#${colour}`).join(", ")})`;

export class Density {
  /**
   * Fetch the grid of a class.
   *
   * @param {object} run answer of the server at /api/run, with a density
   * @param {string} name the class
   */
  static async load(run, name) {
    const { density } = run;
    const label = density.classes.find((entry) => entry.name === name)?.label;
    if (label === undefined) return null;
    const answer = await fetch(`density/${address(run.key)}/${label}?v=${run.version}`);
    if (!answer.ok) throw new Error((await answer.json()).error);
    return new Density(run, name, new Float32Array(await answer.arrayBuffer()));
  }

  constructor(run, name, values) {
    Object.assign(this, { run, name, values, ...run.density });
    const known = values.filter(Number.isFinite).sort();
    this.high = tidyAbove(known[Math.floor(HIGH * (known.length - 1))] ?? 0);
  }

  /** The objects per mm² at a place in pixels of the slide's level 0; NaN outside and where nothing was analysed. */
  at(x, y) {
    const [column, row] = [Math.floor(x / this.cell_px), Math.floor(y / this.cell_px)];
    const inside = column >= 0 && row >= 0 && column < this.width && row < this.height;
    return inside ? this.values[row * this.width + column] : NaN;
  }

  /**
   * Paint the heatmap over the screen.
   *
   * @param {object} view as of LabelTiles.sample
   * @param {Uint32Array} pixels the screen's pixels
   * @param {number} high the value that has the last colour
   */
  paint(view, pixels, high) {
    const { run, cell_px } = this;
    const columns = cells(view.left, view.scale, view.width, cell_px, run.width * run.downsample);
    const rows = cells(view.top, view.scale, view.height, cell_px, run.height * run.downsample);
    const factor = 255 / (high || 1);
    for (let j = 0, k = 0; j < view.height; j++) {
      const line = rows[j] * this.width;
      for (let i = 0; i < view.width; i++, k++) {
        if (rows[j] < 0 || columns[i] < 0) continue;
        const value = this.values[line + columns[i]];
        if (!Number.isNaN(value)) pixels[k] = COLOURS[Math.min(255, Math.round(value * factor))];
      }
    }
  }
}

/** The cell at the centre of each column (or row) of the screen; -1 outside of the slide, which is `size` long. */
function cells(start, step, count, side, size) {
  return Int32Array.from({ length: count }, (_, i) => {
    const position = start + (i + 0.5) * step;
    return position >= 0 && position < size ? Math.floor(position / side) : -1;
  });
}

/** The least of 1, 2 and 5 times a power of 10 that is not below a value. */
function tidyAbove(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((n) => n * power >= value) * power;
}

/** The colour of a share, 0 to 1, as the bytes of an image. */
function mixed(share) {
  const place = share * (ANCHORS.length - 1);
  const low = Math.min(Math.floor(place), ANCHORS.length - 2);
  const [from, to] = [low, low + 1].map((i) => Number.parseInt(ANCHORS[i], 16));
  const bytes = [16, 8, 0].map((shift) => {
    const [a, b] = [(from >> shift) & 255, (to >> shift) & 255];
    return Math.round(a + (b - a) * (place - low));
  });
  return new Uint32Array(Uint8Array.from([...bytes, 255]).buffer)[0];
}
