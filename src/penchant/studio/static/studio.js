// What every page needs beside htmx: a sentence where a request failed.
"use strict";

const studio = {
  say(text) {
    const toast = document.getElementById("toast");
    if (!toast) return;
    toast.textContent = text;
    toast.hidden = !text;
  },
  csrf() {
    return JSON.parse(document.body.getAttribute("hx-headers") || "{}");
  },
};

document.addEventListener("htmx:responseError", (event) => {
  const said = event.detail.xhr.responseText;
  studio.say(said && said.length < 600 && !said.includes("<") ? said : `The studio answered with ${event.detail.xhr.status}.`);
});
document.addEventListener("submit", (event) => {
  if (!event.target.matches("[data-picks]") || event.target.querySelector("input:checked")) return;
  event.preventDefault();
  studio.say("Tick the runs first.");
});
document.addEventListener("htmx:sendError", () => studio.say("The studio cannot be reached. Is it still running?"));
document.addEventListener("htmx:afterRequest", (event) => event.detail.successful && studio.say(""));
