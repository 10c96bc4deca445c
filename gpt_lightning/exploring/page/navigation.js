/** Keyboard access to lists and tables of many items: one stop of the Tab key, then the arrow keys. */

import { newId } from "./elements.js";

const ACTIVE = "active";

/**
 * Make the items of `container` reachable by the arrow keys and by the mouse.
 *
 * Left and right move by one item, up and down to the nearest item of the line above or below.
 * `onActive(item)` runs when an item is pointed at, `onChoose(item)` on a click, Enter or Space.
 */
export function makeNavigable(container, selector, { onActive, onChoose, onBack }) {
  container.tabIndex = 0;
  const items = () => [...container.querySelectorAll(selector)];

  function activate(item, scroll = true) {
    container.querySelector(`.${ACTIVE}`)?.classList.remove(ACTIVE);
    item.id ||= newId("item");
    item.classList.add(ACTIVE);
    container.setAttribute("aria-activedescendant", item.id);
    if (scroll) item.scrollIntoView({ block: "nearest", inline: "nearest" });
    onActive?.(item);
  }

  container.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target !== container) return;
    if (event.key === "Backspace" && onBack) {
      event.preventDefault();
      onBack();
      return;
    }
    const all = items();
    if (all.length === 0) return;
    const current = all.indexOf(container.querySelector(`.${ACTIVE}`));
    const target = targetOf(event.key, all, current);
    if (target) {
      event.preventDefault();
      activate(target);
    } else if ((event.key === "Enter" || event.key === " ") && onChoose) {
      event.preventDefault();
      if (current >= 0) onChoose(all[current]);
    }
  });
  container.addEventListener("focus", () => {
    const active = container.querySelector(`.${ACTIVE}`);
    const first = active ?? items()[0];
    if (first && container.matches(":focus-visible")) activate(first, false);
  });
  container.addEventListener("pointerover", (event) => {
    const item = event.target.closest(selector);
    if (item) activate(item, false);
  });
  container.addEventListener("click", (event) => {
    const item = event.target.closest(selector);
    if (!item) return;
    activate(item, false);
    onChoose?.(item);
  });
}

function targetOf(key, items, current) {
  switch (key) {
    case "ArrowRight":
      return items[Math.min(current + 1, items.length - 1)];
    case "ArrowLeft":
      return items[Math.max(current - 1, 0)];
    case "ArrowDown":
      return current < 0 ? items[0] : nearestInLine(items, current, 1);
    case "ArrowUp":
      return current < 0 ? items[0] : nearestInLine(items, current, -1);
    case "Home":
      return items[0];
    case "End":
      return items[items.length - 1];
    default:
      return null;
  }
}

/** The item of the next line (`direction` 1) or of the one before (-1) that is nearest in x. */
function nearestInLine(items, current, direction) {
  const middle = (box) => (box.left + box.right) / 2;
  const from = items[current].getBoundingClientRect();
  let line = null;
  let best = items[current];
  let distance = Infinity;
  for (let i = current + direction; i >= 0 && i < items.length; i += direction) {
    const box = items[i].getBoundingClientRect();
    const isBeyond = direction > 0 ? box.top > from.top + 2 : box.top < from.top - 2;
    if (!isBeyond) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > 2) break;
    if (Math.abs(middle(box) - middle(from)) < distance) {
      distance = Math.abs(middle(box) - middle(from));
      best = items[i];
    }
  }
  return best;
}
