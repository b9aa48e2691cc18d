// Labels of a run: tiles are fetched as grey PNG, kept as bytes, and looked up for every pixel of
// the screen. Labels are never smoothed, and new colours need no new tiles.

const KEPT = 256; // tiles of at most 512 x 512 bytes: 64 MiB
const AT_ONCE = 6; // requests
const RETRY_MS = 5000;
export const NONE = 255; // not analysed, not finished, or not fetched yet

export class LabelTiles {
  /**
   * @param {object} run answer of the server at /api/run
   * @param {() => void} changed called when a tile was fetched
   */
  constructor(run, changed) {
    this.run = run;
    this.changed = changed;
    this.tiles = new Map(); // by "level/column/row", last used last
    this.wanted = new Map();
    this.fetching = new Set();
    this.failed = new Map();
  }

  /** Take a new answer of the server; changed tiles are fetched again, and shown until then. */
  update(run) {
    const before = this.run;
    this.run = run;
    const bands = run.version === before.version ? (run.bands ?? []) : null;
    for (const tile of this.tiles.values()) {
      if (bands === null || bands.some((band, i) => grew(tile, band, before.bands[i].rows))) {
        tile.stale = true;
      }
    }
  }

  /**
   * Look up the label of each pixel of the screen.
   *
   * @param {{left: number, top: number, scale: number, width: number, height: number}} view
   *   Corner in pixels of the slide's level 0, such pixels per pixel of the screen, and the
   *   screen's size in its own pixels.
   * @returns {Uint8Array} (height * width) labels.
   */
  sample(view) {
    const { run } = this;
    const out = new Uint8Array(view.width * view.height).fill(NONE);
    const step = view.scale / run.downsample;
    const finest = Math.floor(Math.log2(Math.max(step, 1)));
    const level = Math.min(finest, run.levels - 1);
    const xs = places(view.left / run.downsample, step, view.width, run.width);
    const ys = places(view.top / run.downsample, step, view.height, run.height);
    this.wanted.clear();
    for (const across of spans(xs, level, run.tile_px)) {
      for (const down of spans(ys, level, run.tile_px)) {
        const tile = this.find(level, across.tile, down.tile);
        if (tile) lookUp(tile, xs, ys, across, down, view.width, out);
      }
    }
    this.fetchWanted();
    return out;
  }

  /** Return a tile, or a coarser one while it is being fetched. */
  find(level, column, row) {
    for (let up = 0; level + up < this.run.levels; up++) {
      const key = `${level + up}/${column >> up}/${row >> up}`;
      const tile = this.tiles.get(key);
      if (up === 0 && (!tile || tile.stale)) this.wanted.set(key, [level, column, row]);
      if (tile) {
        this.tiles.delete(key);
        this.tiles.set(key, tile);
        return tile;
      }
    }
    // No tile yet: the coarsest one covers the whole slide, and is fetched first.
    const top = this.run.levels - 1;
    this.wanted.set(`${top}/0/0`, [top, 0, 0]);
    return null;
  }

  fetchWanted() {
    const coarsestFirst = [...this.wanted].sort((a, b) => b[1][0] - a[1][0]);
    for (const [key, position] of coarsestFirst) {
      if (this.fetching.size >= AT_ONCE) return;
      const mayRetry = (this.failed.get(key) ?? -Infinity) + RETRY_MS <= performance.now();
      if (!this.fetching.has(key) && mayRetry) this.fetch(key, position);
    }
  }

  async fetch(key, [level, column, row]) {
    const { run } = this;
    const rows = (run.bands ?? []).map((band) => band.rows).join(".");
    this.fetching.add(key);
    try {
      const url = `tiles/labels/${address(run.key)}/${key}?v=${run.version}-${rows}`;
      const pixels = await greyOf(url);
      this.tiles.delete(key);
      this.tiles.set(key, { ...pixels, level, column, row, side: run.tile_px, stale: run !== this.run });
      this.failed.delete(key);
      while (this.tiles.size > KEPT) this.tiles.delete(this.tiles.keys().next().value);
    } catch {
      this.failed.set(key, performance.now());
    } finally {
      this.fetching.delete(key);
      this.changed();
    }
  }
}

/** A run's key, encoded for an address. */
export function address(key) {
  return key.split("/").map(encodeURIComponent).join("/");
}

/** Whether rows of a band inside a tile were finished since the last answer. */
function grew(tile, band, rowsBefore) {
  const side = tile.side << tile.level;
  const [x, y] = [tile.column * side, tile.row * side];
  return band.x0 < x + side && band.x1 > x && rowsBefore < y + side && band.rows > y && band.rows > rowsBefore;
}

/** The label map's column (or row) at the centre of each column (or row) of the screen; -1 outside. */
function places(start, step, count, size) {
  const positions = new Int32Array(count);
  for (let i = 0; i < count; i++) {
    const position = Math.floor(start + (i + 0.5) * step);
    positions[i] = position >= 0 && position < size ? position : -1;
  }
  return positions;
}

/** The range of the screen's columns (or rows) on each tile: [{tile, from, to}]. */
function spans(places, level, side) {
  const ranges = [];
  for (let i = 0; i < places.length; i++) {
    if (places[i] < 0) continue;
    const tile = Math.floor((places[i] >> level) / side);
    const last = ranges.at(-1);
    if (last && last.tile === tile) last.to = i + 1;
    else ranges.push({ tile, from: i, to: i + 1 });
  }
  return ranges;
}

function lookUp(tile, xs, ys, across, down, width, out) {
  const { data, level } = tile;
  const [x0, y0] = [tile.column * tile.side, tile.row * tile.side];
  for (let j = down.from; j < down.to; j++) {
    const line = ((ys[j] >> level) - y0) * tile.width - x0;
    const to = j * width;
    for (let i = across.from; i < across.to; i++) out[to + i] = data[line + (xs[i] >> level)];
  }
}

/** The pixels of a grey PNG, one byte each. */
async function greyOf(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${answer.status} ${url}`);
  const exact = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(await answer.blob(), exact);
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const rgba = new Uint32Array(context.getImageData(0, 0, width, height).data.buffer);
  return { width, height, data: Uint8Array.from(rgba, (pixel) => pixel & 255) };
}
