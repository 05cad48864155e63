// The token of the user whom your middleware found: app.get("/realtime-token", realtimeToken).
import jwt from "jsonwebtoken";

export function realtimeToken(request, response) {
  if (!request.user) return response.status(401).json({});
  const token = jwt.sign({}, process.env.REALTIME_SECRET, {
    algorithm: "HS256",
    subject: String(request.user.id),
    expiresIn: "10m",
  });
  response.json({ token });
}
