// What the page says of the alerts that Prometheus has, as /api/v1/alerts lists them.

const SEVERITIES = ["critical", "warning"];

// What is worse comes first; of these what began first, because a cause comes before what follows from it.
export function sorted(alerts) {
  const rank = (alert) => (SEVERITIES.indexOf(alert.labels.severity) + SEVERITIES.length + 1) % (SEVERITIES.length + 1);
  return [...alerts].sort((one, other) => rank(one) - rank(other) || Date.parse(one.activeAt) - Date.parse(other.activeAt));
}

// The sentence above everything, and whether it is a good one. Without the alert that always fires nobody judges.
export function verdict(alerts) {
  if (!alerts.some((alert) => alert.labels.alertname === "Watchdog" && alert.state === "firing")) {
    return ["No alert is judged: the rules are not loaded, or Prometheus has just started", false];
  }
  const firing = alerts.filter((alert) => alert.state === "firing" && alert.labels.severity !== "none");
  if (firing.length === 0) return ["Nothing is known to be broken", true];
  const first = sorted(firing)[0];
  const more = firing.length > 1 ? `, and ${firing.length - 1} more` : "";
  return [`${first.annotations.summary ?? first.labels.alertname}${more}`, false];
}
