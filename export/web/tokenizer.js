// CLIP's byte-pair encoding, read from the bundle's own tokenizer.json. Gives what the Rust tokenizers library gives.

// Rust's \s is Unicode's White_Space; JavaScript's differs in two characters.
const SPACE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const SPACES = new RegExp(`[${SPACE}]+`, "gu");
const WORDS = new RegExp(`<\\|startoftext\\|>|<\\|endoftext\\|>|'s|'t|'re|'ve|'m|'ll|'d|\\p{L}+|\\p{N}|[^${SPACE}\\p{L}\\p{N}]+`, "gu");
const PIECES = new RegExp(`'s|'t|'re|'ve|'m|'ll|'d|\\p{L}+|\\p{N}+|[^${SPACE}\\p{L}\\p{N}]+`, "gu");
const END_OF_WORD = "</w>";

/** GPT-2's printable stand-in for every byte. */
function byteLetters() {
  const letters = [];
  let spare = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    letters.push(String.fromCodePoint(printable ? byte : spare++));
  }
  return letters;
}

export class Tokenizer {
  /** `model`: the parsed tokenizer.json; `facts`: {length, start, end, pad}, in token ids but for the length. */
  constructor(model, facts) {
    this.facts = facts;
    this.ids = new Map(Object.entries(model.model.vocab));
    this.ranks = new Map(model.model.merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
    this.unknown = this.ids.get(model.model.unk_token) ?? facts.end;
    this.special = new Map((model.added_tokens ?? []).map((token) => [token.content, token.id]));
    this.letters = byteLetters();
    this.bytes = new TextEncoder();
    const names = [...this.special.keys()].map((name) => name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    this.cut = names.length ? new RegExp(`(${names.join("|")})`, "u") : null;
  }

  /** Token ids of a prompt, framed, cut and filled up to the model's length. */
  encode(prompt) {
    const { length, start, end, pad } = this.facts;
    const parts = this.cut ? prompt.split(this.cut) : [prompt];
    const ids = parts.flatMap((part) => (this.special.has(part) ? [this.special.get(part)] : this.#text(part)));
    const row = [start, ...ids.slice(0, length - 2), end];
    return [...row, ...Array(length - row.length).fill(pad)];
  }

  #text(text) {
    const spaced = text.normalize("NFC").replace(SPACES, " ");
    // Letter by letter: JavaScript would turn a final capital sigma into another letter than Rust does.
    const plain = Array.from(spaced, (letter) => letter.toLowerCase()).join("");
    const words = (plain.match(WORDS) ?? []).flatMap((word) => word.match(PIECES) ?? []);
    return words.flatMap((word) => this.#word(word));
  }

  /** Joins the pair that was learned first, until no pair is known. */
  #word(word) {
    const parts = Array.from(this.bytes.encode(word), (byte) => this.letters[byte]);
    parts[parts.length - 1] += END_OF_WORD;
    for (;;) {
      let best = -1;
      let rank = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const found = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (found < rank) [best, rank] = [i, found];
      }
      if (best < 0) break;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
    return parts.map((part) => this.ids.get(part) ?? this.unknown);
  }
}
