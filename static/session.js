/* Who is looking, and what may they do? The master decides; what it would refuse, the page does not offer. */
export const LADDER = ["viewer", "submitter", "operator", "admin"];  // each may do what those before it may, too
const NOBODY = { role: null, name: null, key_needed: true };

let who = NOBODY;
/** As GET /session says it: role null is nobody yet; key_needed false is a master that takes everybody for an admin. */
export const session = () => who;
export function know(said) { who = said || NOBODY; }
export const may = (role) => LADDER.indexOf(who.role) >= LADDER.indexOf(role);
