-- arbiter. most chunks of each, views (1: of each chunk too), then per rollout rid, first chunk
-- -> ok + one packed list, with per rollout {head, verdict, threshold, finish, chunks, length, then tokens and divergence
-- of each scored chunk from the first one on, and its view where views are read, '' if it has none}; head is true where chunks were read before; verdict is true or false
-- Only reads. One string, packed here, costs the arbiter a tenth of what it costs to read as many replies.
local most, views, packed = tonumber(ARGV[2]), ARGV[3] == '1', {}
for i = 4, #ARGV, 2 do
  local h, first = rollout(ARGV[i]), tonumber(ARGV[i + 1])
  local row = redis.call('HMGET', h, 'head', 'verdict', 'threshold', 'finish', 'chunks', 'length')
  if first > 0 then row[1] = row[1] and true end
  row[2] = row[2] and true
  for seq = first, first + most - 1 do
    local chunk = redis.call('HMGET', h, 't:' .. seq, 'd:' .. seq)
    if not (chunk[1] and chunk[2]) then break end
    row[#row + 1], row[#row + 2] = chunk[1], chunk[2]
    if views then row[#row + 1] = redis.call('HGET', h, 'v:' .. seq) or '' end
  end
  packed[#packed + 1] = row
end
return {'ok', cmsgpack.pack(packed)}
