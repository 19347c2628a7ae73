-- Fills Redis with ARGV[1] records of some 150 bytes: the same ones each time, no two alike.
for i = 1, tonumber(ARGV[1]) do
    local h = redis.sha1hex(tostring(i))
    redis.call('SET', 'user:' .. i, '{"id":' .. i .. ',"token":"' .. h .. '","name":"user ' .. h:sub(1, 8)
        .. '","mail":"' .. h:sub(9, 16) .. '@example.org","visits":' .. (i % 977) .. '}')
end
return redis.call('DBSIZE')
