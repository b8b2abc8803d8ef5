-- Release each of a list of holds; what was confirmed stays so. Gives how many were settled now.

local settled = 0
for _, hold in ipairs(holds) do
  if not settled_as(hold[OPERATION]) then
    release(hold[OPERATION])
    settle(hold, 'v')
    settled = settled + 1
  end
end
save()
forget_settled()
return settled
