// The line to the server: one change in flight, in order; of a drag only the latest waits; answers that came too late are dropped.

const RETRY = 2000, PATIENCE = 60000;

export class Link {
  // `on`: answer(answer, change), refused(message), lost(message, final), back().
  constructor(page, on) {
    this.page = page;
    this.on = on;
    this.queue = [];
    this.busy = false;
    this.seq = 0;
    this.shown = 0;
    this.gone = false;
    this.timer = null;
  }

  get idle() {
    return !this.busy && this.queue.length === 0;
  }

  async post(verb, body) {
    const seq = ++this.seq;
    let response;
    try {
      response = await fetch(`api/${verb}`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ page: this.page, seq, ...body }),
        signal: AbortSignal.timeout(PATIENCE),
      });
    } catch (error) {
      throw new Lost("The explorer does not answer. Is it still running?", false);
    }
    if (response.status === 403) throw new Lost("The explorer was started again: open the address that it printed.", true);
    let found = {};
    try {
      found = await response.json();
    } catch (error) {
      throw new Lost("The explorer broke off in the middle of an answer.", false);
    }
    if (!response.ok) throw new Error(found.error || `The explorer answered ${response.status}.`);
    if (this.gone) {
      this.gone = false;
      this.on.back();
    }
    return found;
  }

  change(change) {
    const last = this.queue[this.queue.length - 1];
    if (last && merged(last, change)) Object.assign(last, merged(last, change));
    else this.queue.push(change);
    this.pump();
  }

  async pump() {
    if (this.busy || this.gone || this.queue.length === 0) return;
    this.busy = true;
    const change = this.queue.shift();
    try {
      const answer = await this.post("change", change);
      if (answer.seq > this.shown) {
        this.shown = answer.seq;
        this.busy = false;
        this.on.answer(answer, change);
      }
    } catch (error) {
      this.busy = false;
      if (error instanceof Lost) {
        this.queue.unshift(change);
        this.lost(error);
      } else {
        this.queue = [];
        this.on.refused(error.message);
      }
    }
    this.busy = false;
    this.pump();
  }

  lost(error) {
    this.gone = true;
    this.on.lost(error.message, error.final);
    clearTimeout(this.timer);
    if (!error.final) this.timer = setTimeout(() => this.again(), RETRY);
  }

  // Ask whether the server is back, and go on where the line broke.
  async again() {
    clearTimeout(this.timer);
    try {
      await this.post("tasks", { search: "" });
      this.pump();
    } catch (error) {
      if (error instanceof Lost) this.lost(error);
    }
  }
}

export class Lost extends Error {
  constructor(message, final) {
    super(message);
    this.final = final;
  }
}

// Two waiting changes of which the second makes the first needless, or both can be made at once.
function merged(a, b) {
  if (a.do === "set" && b.do === "set") return { ...a, ...b };
  if (!b.gesture || a.gesture !== b.gesture || a.do !== b.do) return null;
  if (a.do === "move" && a.index === b.index) return b;
  if (a.do === "paint") return { ...a, x: [...a.x, ...b.x], y: [...a.y, ...b.y] };
  return null;
}
