// The dialog that asks for the API key.

import { byId, setText } from "./dom.js";

/** `onKey` is called when another key is set. */
export function setUpKeyDialog(client, onKey) {
  const [dialog, input, message] = [byId("key-dialog"), byId("key-input"), byId("key-message")];
  let isDeclined = false; // whoever closed it is not asked again by every poll
  let isUsed = false;

  const open = (text) => {
    if (dialog.open) return;
    message.hidden = !text;
    setText(message, text);
    input.value = "";
    dialog.showModal();
    input.focus();
  };
  client.onKeyWanted = (text, wasSent) => {
    if (isDeclined) return;
    open(wasSent ? text : "");
  };
  byId("key").addEventListener("click", () => open(""));
  byId("key-cancel").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    isDeclined = !isUsed;
    if (isUsed) onKey();
    isUsed = false;
  });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    client.key = input.value.trim();
    input.value = "";
    isUsed = true;
    dialog.close();
  });
  return {
    get isOpen() {
      return dialog.open;
    },
  };
}
