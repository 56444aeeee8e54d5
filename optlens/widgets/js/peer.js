// Questions to Python. On each channel one is on its way at a time, and of those that wait only the
// newest is sent: who holds an arrow key down gets where he stops, not every place that he passed.

import { unpacked } from "./arrays.js";

/** Why a question has no answer: Python refused it, or there is no Python behind this view. */
export class NoAnswer extends Error {
  constructor(message, gone = false) {
    super(message);
    this.gone = gone;
  }
}

/**
 * Return `ask(channel, question)`, a promise of the answer; null once a newer question on the channel
 * has taken its place.
 * @param {object} model the widget's model: `send`, `on`, `off`
 * @param {object} options
 * @param {(state: string) => void} options.report told "asking", "busy", "silent", "gone", "" (all answered)
 * @param {() => boolean} options.live whether a kernel is connected
 * @param {number[]} options.patience milliseconds until busy is reported, the question is sent again, and
 *   silence is reported
 */
export function makePeer(model, { report, live, patience = [1500, 8000, 30000] }) {
  const channels = new Map(); // name -> { now, next }
  let lastId = 0;

  const open = () => [...channels.values()].filter((channel) => channel.now);
  const tell = () => {
    const levels = open().map((channel) => channel.now.state);
    report(["silent", "busy", "asking"].find((state) => levels.includes(state)) ?? "");
  };

  const transmit = (asked) => {
    try {
      model.send({ kind: "ask", id: asked.id, question: asked.question });
    } catch {
      // No channel to Python; the timers will say so.
    }
  };

  const begin = (channel, asked) => {
    channel.now = asked;
    asked.id = lastId += 1;
    asked.state = "asking";
    if (!live()) {
      end(channel, () => asked.reject(new NoAnswer("This needs a running kernel.", true)));
      report("gone");
      return;
    }
    const [busy, again, silent] = patience;
    const mark = (state) => () => {
      asked.state = state;
      tell();
    };
    asked.timers = [
      setTimeout(mark("busy"), busy),
      setTimeout(() => transmit(asked), again), // a lost message costs no more than this
      setTimeout(mark("silent"), silent),
    ];
    transmit(asked);
    tell();
  };

  const end = (channel, settle) => {
    for (const timer of channel.now.timers ?? []) clearTimeout(timer);
    channel.now = null;
    settle();
    const next = channel.next;
    channel.next = null;
    if (next) begin(channel, next);
    else tell();
  };

  const listeners = [];
  const hear = (message, buffers) => {
    for (const { part, run } of listeners) {
      if (message.kind === "news" && message.part === part) run(unpacked(message.content, buffers));
    }
    for (const channel of open()) {
      const { now } = channel;
      if (now.id !== message.id) continue;
      if (message.kind === "answer") {
        end(channel, () => now.resolve(unpacked(message.content, buffers)));
      } else if (message.kind === "error") {
        end(channel, () => now.reject(new NoAnswer(message.message)));
      }
    }
  };
  model.on("msg:custom", hear);

  return {
    ask(name, question) {
      const channel = channels.get(name) ?? { now: null, next: null };
      channels.set(name, channel);
      return new Promise((resolve, reject) => {
        const asked = { question, resolve, reject };
        if (!channel.now) begin(channel, asked);
        else {
          channel.next?.resolve(null);
          channel.next = asked;
        }
      });
    },
    /** Call `run` with what Python sends unasked about a part. */
    listen(part, run) {
      listeners.push({ part, run });
    },
    /** The kernel is gone: nothing that was asked will be answered. */
    lost() {
      for (const channel of open()) {
        const { now } = channel;
        end(channel, () => now.reject(new NoAnswer("This needs a running kernel.", true)));
      }
      report("gone");
    },
    /** Send again what has no answer yet. */
    again() {
      for (const { now } of open()) transmit(now);
    },
    close() {
      model.off("msg:custom", hear);
      for (const { now } of open()) now.timers?.forEach(clearTimeout);
    },
  };
}
