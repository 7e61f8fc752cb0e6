"use strict";
const gradflow = {};

// Light or dark: as the system says, or as the reader chose.
(() => {
  const WORDS = { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" };
  const ORDER = ["auto", "light", "dark"];
  const root = document.documentElement;
  const button = document.getElementById("theme");

  const remembered = () => {
    try {
      return localStorage.getItem("gradflow-theme");
    } catch {
      return null; // some browsers keep nothing for a file
    }
  };

  function choose(theme, redraw = true) {
    root.dataset.theme = theme;
    button.textContent = WORDS[theme];
    try {
      localStorage.setItem("gradflow-theme", theme);
    } catch {
      // for this visit alone, then
    }
    if (redraw) gradflow.refresh?.();
  }

  button.hidden = false;
  button.addEventListener("click", () =>
    choose(ORDER[(ORDER.indexOf(root.dataset.theme) + 1) % ORDER.length]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    root.dataset.theme === "auto" && gradflow.refresh?.());
  choose(WORDS[remembered()] ? remembered() : "auto", false);
})();
