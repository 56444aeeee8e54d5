// The card that explains what the mouse is over or the keyboard is at. It lives inside the view, since
// notebooks cut off or restyle what is put beside it.

import { h, setStyle } from "./dom.js";

/** Return a card for a root element: `show(children, anchor)`, `hide()`. */
export function makeTip(root) {
  const card = h("div.ol-tip", { "aria-hidden": "true", hidden: true });
  root.append(card);
  return {
    show(children, anchor) {
      card.replaceChildren(...children);
      card.hidden = false;
      const frame = root.getBoundingClientRect();
      const box = anchor.getBoundingClientRect();
      const left = Math.min(box.left - frame.left, root.clientWidth - card.offsetWidth - 8);
      // Above when the window has no room below; inside the view in any case.
      const fits = box.bottom + card.offsetHeight + 12 < innerHeight || box.top < card.offsetHeight + 12;
      const top = fits ? box.bottom - frame.top + 6 : box.top - frame.top - card.offsetHeight - 6;
      setStyle(card, { left: `${Math.max(8, left)}px`, top: `${top}px` });
    },
    hide() {
      card.hidden = true;
    },
  };
}
