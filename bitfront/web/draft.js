// A job's body on its way from one page to the form: kept in memory, since addresses should stay short.

let draft = null;

/** Leave a body for the form. */
export const draftOf = (body) => (draft = body);

/** Take it, once. */
export function takeDraft() {
  const found = draft;
  draft = null;
  return found;
}
