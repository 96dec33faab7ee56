// What opens over the page: a question before something is done, a picture or a report.

import { RequestError, fetchBlob, here } from "./api.js";
import { el, keyed, setText } from "./dom.js";

function open(dialog) {
  const opener = document.activeElement;
  document.body.append(dialog);
  dialog.addEventListener("close", () => {
    dialog.remove();
    if (!opener.isConnected) keyed(document, opener.dataset.key)?.focus(); // that part was drawn anew meanwhile
  });
  dialog.addEventListener("click", ({ target }) => target === dialog && dialog.close()); // beside it
  dialog.showModal();
}

/**
 * Ask why, then do it.
 *
 * `act({reason, force})` may throw a RequestError: the dialog stays open and says it. Where the gate is against it
 * (`against`: what it says, or null) the name has to be typed, and `force` is true; so too once the server answers that
 * the gate is.
 */
export function ask({ title, text, verb, name = "", against = null, act }) {
  const reason = el("input", { id: "ask-reason", required: true, maxLength: 500, autocomplete: "off" });
  const typed = el("input", { id: "ask-name", autocomplete: "off", spellcheck: false, autocapitalize: "off" });
  const confirmation = el("div", { className: "field" },
    el("label", { htmlFor: "ask-name" }, "To confirm, type ", el("code", {}, name)), typed);
  const error = el("p", { className: "refused", role: "alert" });
  const button = el("button", { className: "button primary" });
  const cancel = el("button", { type: "button", className: "button" }, "Cancel");
  const form = el("form", {},
    el("h2", { id: "ask-title" }, title),
    ...[text, against].filter(Boolean).map((one) => el("p", {}, one)),
    el("div", { className: "field" }, el("label", { htmlFor: "ask-reason" }, "Reason, for the history"), reason),
    confirmation, error,
    el("div", { className: "actions" }, button, cancel));
  const dialog = el("dialog", { className: "ask", "aria-labelledby": "ask-title" }, form);
  let force = false;

  const setForce = (value) => {
    force = value;
    confirmation.hidden = !force;
    button.textContent = force ? `${verb} against the gate's verdict` : verb;
    checkTyped();
  };
  const checkTyped = () => typed.setCustomValidity(force && typed.value !== name ? `Type ${name}` : "");
  typed.oninput = checkTyped;
  cancel.onclick = () => dialog.close();
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (button.ariaDisabled === "true") return;
    button.ariaDisabled = true;
    try {
      await act({ reason: reason.value.trim(), force });
      dialog.close();
    } catch (refusal) {
      if (!(refusal instanceof RequestError)) throw refusal;
      setText(error, refusal.message);
      if (refusal.code?.startsWith("gate_")) setForce(true);
    } finally {
      button.ariaDisabled = false;
    }
  };
  setForce(Boolean(against));
  open(dialog);
}

/** Show a picture (of an address in this page) large. */
export function showPicture(name, source) {
  show(name, el("img", { src: source, alt: name }));
}

/** Show a report as it is written. Throws a RequestError. */
export async function showReport(name, url) {
  const text = await (await fetchBlob(here(url))).text();
  show(name, el("pre", { tabIndex: 0, role: "region", "aria-label": name }, text));
}

function show(name, content) {
  const close = el("button", { type: "button", className: "button" }, "Close");
  const dialog = el("dialog", { className: "viewer", "aria-label": name },
    el("div", { className: "row" }, el("h2", {}, name), close), content);
  close.onclick = () => dialog.close();
  open(dialog);
}
