# The token of a user, with the gem jwt. In a controller:
#   render json: { token: RealtimeToken.for(current_user) }
require "jwt"

module RealtimeToken
  def self.for(user)
    claims = { sub: user.id.to_s, exp: Time.now.to_i + 600 }
    JWT.encode(claims, ENV.fetch("REALTIME_SECRET"), "HS256")
  end
end
