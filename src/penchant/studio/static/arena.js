// The arena: one key for a verdict, the seconds that it took, folds, and answers that are written while a person waits.
"use strict";

(() => {
  let since = performance.now();
  let away = 0; // milliseconds for which the page was hidden
  let hidden = document.hidden ? performance.now() : null;
  let stream = null;

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) hidden = performance.now();
    else if (hidden !== null) {
      away += performance.now() - hidden;
      hidden = null;
    }
  });

  function begin() {
    since = performance.now();
    away = 0;
    stream?.close();
    stream = null;
    const arena = document.getElementById("arena");
    if (arena?.dataset.live) follow(arena);
  }

  // ---- answers under way
  function follow(arena) {
    stream = new EventSource(arena.dataset.live);
    const mine = stream;
    for (const side of ["left", "right"]) {
      stream.addEventListener(side, (event) => {
        const { text } = JSON.parse(event.data);
        const at = document.getElementById(side);
        at.append(at.textContent ? text : text.trimStart()); // as it stands once it is whole
      });
    }
    stream.addEventListener("failed", (event) => {
      mine.close();
      for (const side of ["left", "right"]) document.getElementById(side).removeAttribute("aria-busy");
      studio.say(`${JSON.parse(event.data).text}. Load the page to try again, or skip the pair.`);
    });
    stream.addEventListener("done", () => {
      mine.close();
      htmx.ajax("GET", arena.dataset.item, { target: "#arena", swap: "outerHTML" });
    });
    stream.onerror = () => {
      if (mine.readyState === EventSource.CLOSED) return;
      mine.close(); // a second stream would begin the answers anew
      studio.say("The answers stopped coming. Load the page again.");
    };
  }

  // ---- keys
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const at = event.target;
    const typing = at.matches?.("textarea, select, input:not([type=checkbox]):not([type=radio])");
    if (event.key === "Escape" && typing) return at.blur();
    if (typing || !document.getElementById("arena")) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (key === "e") {
      const edit = document.querySelector("details.edit");
      if (!edit) return;
      event.preventDefault();
      edit.open = true;
      return edit.querySelector("textarea").focus();
    }
    const button = [...document.querySelectorAll("#arena [data-key]")].find((b) => b.dataset.key.split(" ").includes(key));
    if (!button) return;
    event.preventDefault();
    if (!event.repeat && !button.disabled) button.click();
  });

  document.addEventListener("click", (event) => {
    const fold = event.target.closest?.("[data-fold]");
    if (fold) {
      const open = document.getElementById("sides").classList.toggle("folded");
      fold.firstChild.textContent = open ? "Show both answers whole " : "Fold both answers ";
    }
    const copy = event.target.closest?.("[data-copy]");
    if (copy) {
      const edited = document.querySelector("textarea[name=edited]");
      edited.value = document.querySelector(`[data-raw=${copy.dataset.copy}]`).value;
      edited.focus();
    }
  });

  document.addEventListener("htmx:configRequest", (event) => {
    if (event.detail.elt.id !== "judge") return;
    const gone = away + (hidden === null ? 0 : performance.now() - hidden);
    event.detail.parameters["seconds"] = ((performance.now() - since - gone) / 1000).toFixed(2);
  });
  document.addEventListener("htmx:afterSettle", (event) => {
    if (event.detail.target?.id !== "arena" && event.detail.elt?.id !== "arena") return;
    window.scrollTo(0, 0);
    begin();
  });

  // ---- the form of a new arena shows the part that was chosen
  function parts() {
    const chosen = document.querySelector("input[name=source]:checked")?.value;
    for (const part of document.querySelectorAll("[data-part]")) part.hidden = part.dataset.part !== chosen;
  }
  document.addEventListener("change", (event) => event.target.name === "source" && parts());

  parts();
  begin();
})();
