// The noise of export/noise.py: Philox4x32-10 of (draw, 0, i, 0) under the seed, then Box-Muller. The same seed gives the same numbers.

const MULTIPLY = [0xd2511f53, 0xcd9e8d57];
const WEYL = [0x9e3779b9, 0xbb67ae85];

/** The high 32 bits of a product of two 32-bit words; Math.imul has the low ones. */
function high(a, b) {
  const [al, ah, bl, bh] = [a & 0xffff, a >>> 16, b & 0xffff, b >>> 16];
  const middle = ah * bl + ((al * bl) >>> 16);
  const other = al * bh + (middle & 0xffff);
  return (ah * bh + Math.floor(middle / 65536) + Math.floor(other / 65536)) >>> 0;
}

/** Ten rounds: four words of 32 bits under a key of two. */
export function philox(counter, key) {
  let [a, b, c, d] = counter;
  let [k0, k1] = key;
  for (let step = 0; step < 10; step++) {
    [a, b, c, d] = [
      (high(c, MULTIPLY[1]) ^ b ^ k0) >>> 0, Math.imul(c, MULTIPLY[1]) >>> 0,
      (high(a, MULTIPLY[0]) ^ d ^ k1) >>> 0, Math.imul(a, MULTIPLY[0]) >>> 0,
    ];
    k0 = (k0 + WEYL[0]) >>> 0;
    k1 = (k1 + WEYL[1]) >>> 0;
  }
  return [a, b, c, d];
}

/** Standard normal Float32Array; draw 0 is the first latent, draw n the noise after step n. `seed`: an integer from 0 to 2^53 - 1. */
export function noise(seed, draw, count) {
  const key = [seed % 2 ** 32, Math.floor(seed / 2 ** 32)];
  const found = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const [x, y] = philox([draw, 0, i, 0], key);
    found[i] = Math.sqrt(-2 * Math.log((x + 0.5) / 2 ** 32)) * Math.sin((2 * Math.PI * (y + 0.5)) / 2 ** 32);
  }
  return found;
}
