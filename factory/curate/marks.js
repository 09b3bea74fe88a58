// What people decided, and how it is saved: shown at once, sent in order, tried again until the server has it on disk.
// Undo goes back through this tab's own steps; the server refuses one that would wipe out someone else's.

const RETRY_MS = 2000;
const POLL_MS = 2000;
const UNDO_STEPS = 500;
const FIELDS = ["verdict", "reason", "caption"];

export class Refusal extends Error {
  constructor(status, body) {
    super(body.error || `the server answered ${status}`);
    this.status = status;
    this.body = body;
  }
}

export async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const answer = await fetch(path, options);
  const found = await answer.json();
  if (!answer.ok) throw new Refusal(answer.status, found);
  return found;
}

export class Marks {
  // changed(id): a decision to show anew; status(waiting, trouble); progress(counts); note(text): something to read.
  constructor({ changed, status, progress, note, who }) {
    Object.assign(this, { changed, status, progress, note, who });
    this.known = new Map();
    this.queue = [];
    this.number = 0;
    this.busy = false;
    try {
      this.steps = JSON.parse(sessionStorage.getItem("steps")) || [];
    } catch {
      this.steps = [];
    }
    window.addEventListener("beforeunload", (event) => {
      if (this.queue.length) event.preventDefault();
    });
    setInterval(() => this.poll(), POLL_MS);
  }

  of(id) {
    return this.known.get(id) || null;
  }

  // What the server says, unless something newer is known or still on its way.
  learn(decision) {
    const known = this.known.get(decision.id);
    if (this.queue.some((one) => one.id === decision.id) || (known && known.number >= decision.number)) return;
    this.known.set(decision.id, decision);
    this.changed(decision.id);
  }

  mark(id, changes) {
    this.show(id, changes);
    this.queue.push({ id, changes, who: this.who() });
    this.pump();
  }

  show(id, changes) {
    const known = this.of(id) || { id, verdict: null, reason: "", caption: null, number: 0 };
    this.known.set(id, { ...known, ...changes, reason: changes.verdict === undefined ? known.reason : changes.reason || "", who: this.who() });
    this.changed(id);
  }

  // Returns the id that was undone, or null.
  async undo() {
    if (this.queue.length) await this.idle();
    const step = this.steps.pop();
    if (!step) {
      this.note("Nothing of yours to undo in this tab.");
      return null;
    }
    this.remember();
    try {
      const { decision, progress } = await ask("api/decide", { id: step.id, changes: step.before, who: this.who(), expect: step.number });
      // My step before on the same picture now stands under a new number.
      const earlier = this.steps.findLast((one) => one.id === step.id && one.number === step.beforeNumber);
      if (earlier) earlier.number = decision.number;
      this.remember();
      this.learn(decision);
      this.progress(progress);
    } catch (error) {
      if (error instanceof Refusal && error.status === 409) {
        if (error.body.decision) this.learn(error.body.decision);
        this.note(`Not undone: ${error.message}.`);
      } else {
        this.steps.push(step);
        this.remember();
        this.note(`Not undone: ${error.message}. Try again.`);
      }
      return null;
    }
    return step.id;
  }

  async pump() {
    if (this.busy) return;
    this.busy = true;
    while (this.queue.length) {
      this.status(this.queue.length, "");
      const { id, changes, who } = this.queue[0];
      try {
        const { decision, before, progress } = await ask("api/decide", { id, changes, who });
        this.queue.shift();
        this.steps.push({ id, number: decision.number, beforeNumber: before ? before.number : 0, before: restore(before, changes) });
        this.remember();
        this.learn(decision);
        this.progress(progress);
      } catch (error) {
        if (error instanceof Refusal && error.status < 500 && error.status !== 403) {
          this.queue.shift();
          this.known.delete(id);
          this.note(`Not saved: ${error.message}.`);
          this.number = 0; // the next poll tells what stands
          this.changed(id);
        } else {
          const why = error instanceof Refusal ? error.message : "the server does not answer; start it again and open its new address";
          this.status(this.queue.length, why);
          await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
        }
      }
    }
    this.busy = false;
    this.status(0, "");
  }

  async idle() {
    while (this.queue.length || this.busy) await new Promise((resolve) => setTimeout(resolve, 20));
  }

  async poll() {
    try {
      const { decisions, number, progress } = await ask(`api/since?number=${this.number}`);
      this.number = number;
      decisions.forEach((decision) => this.learn(decision));
      this.progress(progress);
      if (!this.queue.length) this.status(0, "");
    } catch {
      this.status(this.queue.length, "the server does not answer");
    }
  }

  remember() {
    this.steps = this.steps.slice(-UNDO_STEPS);
    try {
      sessionStorage.setItem("steps", JSON.stringify(this.steps));
    } catch {
      // a full or forbidden storage costs undo across reloads, no more
    }
  }
}

// The changes that bring back what stood before, for the touched fields alone.
function restore(before, changes) {
  const found = {};
  for (const field of FIELDS) {
    if (field in changes || (field === "reason" && "verdict" in changes)) found[field] = before ? before[field] : field === "reason" ? "" : null;
  }
  return found;
}
