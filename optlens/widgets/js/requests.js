// What is asked of the model's run: lists of interventions, another prompt, steps back and forth. A
// list is asked for as a whole, so of several quick clicks the newest question says what all of them
// want. Knows no document.

import { wantedOf } from "./clicks.js";

/**
 * @param {object} given
 * @param {(channel: string, what: string, more: object) => Promise<any>} given.ask null for an answer
 *   that a newer question has made needless
 * @param {() => { inForce: object[], at: number, count: number }} given.state the last answer
 * @param {(state: object) => void} given.settled called with each answer
 * @param {(error: Error) => void} given.failed called with what went wrong; the run is as it was
 * @param {(running: boolean) => void} given.busy called when the first begins and the last ends
 */
export function runRequests({ ask, state, settled, failed, busy, signal }) {
  let wanted = null; // { entries, text }: what was asked for and has not been answered
  let goal = null; // the number of the run that was asked for by a step
  let turn = null; // the newest question
  let running = 0;

  async function transact(what, more) {
    running += 1;
    busy(true);
    try {
      const answer = await ask("run", what, more);
      if (running === 1) wanted = goal = null; // else something newer is on its way
      if (answer && !signal.aborted) settled(answer.state);
    } catch (error) {
      wanted = goal = null;
      if (!signal.aborted) failed(error);
    } finally {
      running -= 1;
      if (!signal.aborted) busy(running > 0);
    }
  }

  return {
    /**
     * Ask for other interventions, on a new text if there is one.
     * @param {(entries: object[]) => object[]} make from what is in force, or will be
     */
    async change(make, text = null) {
      while (goal !== null) await turn; // what it starts from is on its way
      const entries = make(wanted?.entries ?? state().inForce);
      wanted = { entries, text: text ?? wanted?.text ?? null };
      turn = transact("set", { wanted: wantedOf(entries), text: wanted.text });
      await turn;
    },
    /** Go back or forth by a number of steps; beyond either end nothing happens. */
    async go(by) {
      while (wanted) await turn;
      const at = (goal ?? state().at) + by;
      if (at < 0 || at >= state().count) return;
      goal = at;
      turn = transact("go", { at });
      await turn;
    },
  };
}
