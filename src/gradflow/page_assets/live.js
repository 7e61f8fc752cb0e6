"use strict";
// Served (`--serve`), the page asks whether there is a newer page, and takes over
// what has changed in it. A page opened as a file asks nobody.
(() => {
  const EVERY = 2000; // ms
  if (!location.protocol.startsWith("http")) return;
  const state = document.getElementById("live");
  let version = null;

  async function look() {
    try {
      const answer = await (await fetch("version", { cache: "no-store" })).json();
      if (version !== null && answer.version !== version) await renew();
      version = answer.version;
      state.textContent = `live; as of ${new Date(answer.made).toLocaleTimeString()}`;
      state.hidden = false;
    } catch {
      if (version !== null) state.textContent = "the server does not answer";
    }
  }

  async function renew() {
    const text = await (await fetch(location.pathname, { cache: "no-store" })).text();
    const page = new DOMParser().parseFromString(text, "text/html");
    for (const name of ["head-line", "sections", "above", "below", "data"]) {
      const [old, fresh] = [document.getElementById(name), page.getElementById(name)];
      if (old && fresh && old.innerHTML !== fresh.innerHTML) old.replaceWith(document.adoptNode(fresh));
    }
    document.title = page.title;
    gradflow.load?.();
    await gradflow.refresh?.();
  }

  look();
  setInterval(look, EVERY);
})();
