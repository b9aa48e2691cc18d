// What happens to pixels on the device around the network: cut tiles, blend scores, finish rows.
//
// The arithmetic is that of runtime/blend.py and wsi/strips.py, integer for integer, so the result
// is bit for bit that of the host. No thread reads what another writes in the same launch, there is
// no shared memory and no atomic: one thread owns each output pixel and loops over what falls on
// it. That is deterministic by construction, reads and writes each sum once per batch, with
// neighbouring threads on neighbouring addresses, and lets the same source run on the host, where
// the tests compile it with g++ (tests/runtime/host_device.py) and compare it with blend.py.
//
// Every kernel takes pointers and 32-bit numbers only: devices/__init__.py reads the parameters
// here to know how to launch it. No includes, so NVRTC needs no toolkit.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define OUTSIDE 255      // label where no tile was analysed; label_rows.NOT_ANALYSED
#define SCORE_BITS 14    // a score of 1 is 1 << SCORE_BITS in the sums; fixed_point.SCORE_BITS
#define SCORE_MAX 65535  // and this in the shares; label_rows.SCORE_MAX

// Index into 0:size of position i >= 0, mirrored at the first and last pixel; strips._mirrored.
__device__ inline int mirrored(int i, int size) {
    if (i < size) return i;
    if (size < 2) return 0;
    const int period = 2 * (size - 1);
    i %= period;
    return i < period - i ? i : period - i;
}

// floor(s * 2^14 + 1/2) of a float16 number, given as its bits; NaN and negative numbers are 0, more than 1 is 1.
__device__ inline u32 integer_of_half(u16 bits) {
    if (bits > 0x7c00) return 0;
    if (bits >= 0x3c00) return 1u << SCORE_BITS;
    const int exponent = bits >> 10 ? bits >> 10 : 1;  // a number without exponent is subnormal
    const u32 digits = (bits >> 10 ? 1024u : 0u) + (bits & 1023u);
    const int shift = 25 - SCORE_BITS - exponent;
    return shift <= 0 ? digits << -shift : (digits + (1u << (shift - 1))) >> shift;
}

// The same of round(255 s), a byte, which bundles of schema 1 give.
__device__ inline u32 integer_of_byte(u8 byte) {
    return (((u32)byte << SCORE_BITS) + 127u) / 255u;
}

// The first of the tiles at sorted places xs that column x belongs to is the one that owns it.
__device__ inline bool owns(const int* xs, int i, int x, int tile_px) {
    return i == 0 || x >= xs[i - 1] + tile_px;
}

// Cut tiles out of a strip; where one sticks out of the slide, the slide is mirrored.
//
//   rows   (strip height, strip_width, channels) pixels; top left corner (strip_x, strip_y)
//   xs     left edge of each of the batch's tiles, ascending; they all begin at row y
//   tiles  (n, tile_px, tile_px, out_channels); one grey channel becomes three by repetition
//
// One thread per pixel: x over columns, y over rows, z over tiles.
extern "C" __global__ void cut_tiles(
    const u8* __restrict__ rows, const int* __restrict__ xs, u8* __restrict__ tiles,
    int strip_x, int strip_y, int strip_width, int channels,
    int y, int width, int height, int tile_px, int out_channels)
{
    const int tx = blockIdx.x * blockDim.x + threadIdx.x;
    const int ty = blockIdx.y * blockDim.y + threadIdx.y;
    const int i = blockIdx.z;
    if (tx >= tile_px || ty >= tile_px) return;
    const int column = mirrored(xs[i] + tx, width) - strip_x;
    const int row = mirrored(y + ty, height) - strip_y;
    const u8* from = rows + ((u64)row * strip_width + column) * channels;
    u8* to = tiles + (((u64)i * tile_px + ty) * tile_px + tx) * out_channels;
    for (int c = 0; c < out_channels; ++c) to[c] = from[c < channels ? c : 0];
}

// Add the weighted scores of a batch, n tiles of one row of the grid, to the sums.
//
//   scores   (n, classes, tile_px, tile_px), float16, or bytes where bytes is not 0
//   xs       left edge of each tile, ascending, in pixels of the slide
//   places   each tile's column of the grid: its profile is row places[i] of wx
//   wx       (columns, tile_px) weights along x;  wy  (tile_px) weights along y, of this row
//   sums     (classes, tile_px, width): a ring of rows, row y of the slide is at y % tile_px
//   columns  (width) sum of wx over the tiles of this row
//   left     column of the slide that is column 0 of the sums;  y  the tiles' first row
//
// One thread per pixel of each tile, as in cut_tiles. Where tiles of the batch overlap, the first
// of them does the work of all, and the threads of the others end at once.
extern "C" __global__ void add_scores(
    const void* __restrict__ scores, const int* __restrict__ xs, const int* __restrict__ places,
    const u32* __restrict__ wx, const u32* __restrict__ wy,
    u32* __restrict__ sums, u32* __restrict__ columns,
    int n, int classes, int tile_px, int y, int left, int width, int bytes)
{
    const int tx = blockIdx.x * blockDim.x + threadIdx.x;
    const int ty = blockIdx.y * blockDim.y + threadIdx.y;
    const int first = blockIdx.z;
    if (tx >= tile_px || ty >= tile_px) return;
    const int x = xs[first] + tx;
    if (!owns(xs, first, x, tile_px)) return;
    const u64 plane = (u64)tile_px * tile_px;
    const u64 target = (u64)((y + ty) % tile_px) * width + (x - left);
    const u64 stride = (u64)tile_px * width;  // from one class to the next
    const u32 down = wy[ty];
    u32 across = 0;
    for (int i = first; i < n && xs[i] <= x; ++i) {
        const int at = x - xs[i];
        const u32 w = wx[(u64)places[i] * tile_px + at];
        across += w;
        const u32 weight = down * w;
        if (weight == 0) continue;
        const u64 score = (u64)i * classes * plane + (u64)ty * tile_px + at;
        for (int k = 0; k < classes; ++k) {
            const u64 place = score + k * plane;
            const u32 value = bytes ? integer_of_byte(((const u8*)scores)[place])
                                    : integer_of_half(((const u16*)scores)[place]);
            sums[target + k * stride] += weight * value;
        }
    }
    if (ty == 0) columns[x - left] += across;
}

// Turn the rows that no later tile reaches into labels, and clear their sums for the rows to come.
//
//   sums     as in add_scores; rows top:top + count of the slide are finished
//   columns  (slots, width): the column weights of row r of the grid are at r % slots
//   ys       first row of each row of tiles;  wys  (rows of the grid, tile_px) weights along y
//   labels   (count, x1 - x0): the class of the largest sum, the lower one where two are equal
//   shares   (count, x1 - x0, classes): the sums divided by the weight, 0 to SCORE_MAX, rounded; may be null
//   first    first row of the grid that reaches below top;  last  the row of the grid just added
//   weighed  whether tiles may be missing, so that a pixel without weight is OUTSIDE
//   x0, x1   the columns of the sums that are wanted; the others only reach in from neighbours
//
// One thread per pixel: x over columns, y over rows.
extern "C" __global__ void finish_rows(
    u32* __restrict__ sums, const u32* __restrict__ columns,
    const int* __restrict__ ys, const u32* __restrict__ wys,
    u8* __restrict__ labels, u16* __restrict__ shares,
    int classes, int tile_px, int width, int top, int count, int first, int last, int slots,
    int weighed, int x0, int x1)
{
    const int x = blockIdx.x * blockDim.x + threadIdx.x;
    const int row = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || row >= count) return;
    const int y = top + row;
    const u64 stride = (u64)tile_px * width;
    u32* sum = sums + (u64)(y % tile_px) * width + x;
    if (x >= x0 && x < x1) {
        const u64 out = (u64)row * (x1 - x0) + (x - x0);
        u32 best = sum[0];
        int label = 0;
        for (int k = 1; k < classes; ++k) {
            const u32 value = sum[k * stride];
            if (value > best) {
                best = value;
                label = k;
            }
        }
        if (weighed || shares) {
            u32 weight = 0;
            for (int r = first; r <= last; ++r) {
                const int at = y - ys[r];
                if (at >= 0 && at < tile_px)
                    weight += wys[(u64)r * tile_px + at] * columns[(u64)(r % slots) * width + x];
            }
            if (weight == 0) label = OUTSIDE;
            if (shares) {
                const u64 divisor = (u64)(weight ? weight : 1) << SCORE_BITS;
                for (int k = 0; k < classes; ++k)
                    shares[out * classes + k] = (u16)(((u64)sum[k * stride] * SCORE_MAX + divisor / 2) / divisor);
            }
        }
        labels[out] = (u8)label;
    }
    for (int k = 0; k < classes; ++k) sum[k * stride] = 0;
}
