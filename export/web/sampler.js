// The few-step loop of export/runtime.py: constants come from the bundle, one UNet call a step.

import { noise } from "./noise.js";

/** The embedding of a guidance scale, for graphs that take one: sines, then cosines, of 1000 (scale - 1). As export/guidance.py. */
export function embedScale(scale, width) {
  const half = width / 2;
  const angles = Array.from({ length: half }, (_, i) => (scale - 1) * 1000 * 10000 ** (-i / (half - 1)));
  return Float32Array.from([...angles.map(Math.sin), ...angles.map(Math.cos)]);
}

/** The final latent. `unet(latent, t)` answers with the prediction; `onStep(done)` hears of each step. */
export async function denoise(unet, scheduler, count, seed, onStep) {
  let latent = noise(seed, 0, count);
  for (const [i, row] of scheduler.steps.entries()) {
    const said = await unet(latent, row.t);
    const fresh = "next_alpha" in row ? noise(seed, i + 1, count) : null;
    latent = latent.map((x, at) => {
      const clean = scheduler.prediction_type === "epsilon" ? (x - row.sigma * said[at]) / row.alpha : row.alpha * x - row.sigma * said[at];
      const mixed = row.c_skip * x + row.c_out * clean;
      return fresh ? row.next_alpha * mixed + row.next_sigma * fresh[at] : mixed;
    });
    onStep(i + 1);
  }
  return latent;
}

/** Planes of some pictures, N 3 H W in [0, 1], to RGBA bytes, one picture below the other. Throws for what is not a number. */
export function toPixels(planes, width, height, images) {
  const area = width * height;
  const pixels = new Uint8ClampedArray(images * area * 4).fill(255);
  for (let at = 0; at < images * area; at++) {
    const first = Math.floor(at / area) * 3 * area + (at % area);
    for (let c = 0; c < 3; c++) {
      const value = planes[first + c * area];
      if (!Number.isFinite(value)) throw new Error("the model drew a picture that is not a number");
      pixels[at * 4 + c] = value * 255;
    }
  }
  return pixels;
}
