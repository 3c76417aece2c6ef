/* Which key has a task that names none? One made of its content, the same that main.py submit makes: what is sent again is there already. */

/** JSON with sorted keys: the same content gives the same bytes. */
function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  return `{${Object.keys(value).sort().map((name) => `${JSON.stringify(name)}:${canonical(value[name])}`).join(",")}}`;
}
export function contentKey(task) {
  const { unique_key: _key, if_exists: _exists, max_batch_tasks: _most, ...content } = task;
  return `content-${sha256(new TextEncoder().encode(canonical(content))).slice(0, 40)}`;
}

// Browsers have SHA-256 over HTTPS and on localhost only, and a master is often looked at over plain HTTP in its own network.
const primes = (count) => { const found = []; for (let n = 2; found.length < count; n += 1) if (found.every((prime) => n % prime)) found.push(n); return found; };
const fraction = (n) => ((n - Math.floor(n)) * 2 ** 32) | 0;
const ROUND = primes(64).map((prime) => fraction(Math.cbrt(prime))), START = primes(8).map((prime) => fraction(Math.sqrt(prime)));
/** FIPS 180-4, in hex digits. */
export function sha256(bytes) {
  const padded = new Uint8Array(((bytes.length + 8) >> 6 << 6) + 64), view = new DataView(padded.buffer);
  padded.set(bytes);
  padded[bytes.length] = 0x80;
  view.setUint32(padded.length - 8, Math.floor(bytes.length / 2 ** 29));
  view.setUint32(padded.length - 4, bytes.length << 3);
  const sum = [...START], w = new Int32Array(64), turn = (x, n) => (x >>> n) | (x << (32 - n));
  for (let block = 0; block < padded.length; block += 64) {
    for (let i = 0; i < 64; i += 1) {
      const [x, y] = [w[i - 15], w[i - 2]];
      w[i] = i < 16 ? view.getInt32(block + 4 * i) : w[i - 16] + (turn(x, 7) ^ turn(x, 18) ^ (x >>> 3)) + w[i - 7] + (turn(y, 17) ^ turn(y, 19) ^ (y >>> 10));
    }
    let [a, b, c, d, e, f, g, h] = sum;
    for (let i = 0; i < 64; i += 1) {
      const one = (h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + ROUND[i] + w[i]) | 0;
      const two = ((turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + one) | 0, c, b, a, (one + two) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((word, i) => { sum[i] = (sum[i] + word) | 0; });
  }
  return sum.map((word) => (word >>> 0).toString(16).padStart(8, "0")).join("");
}
