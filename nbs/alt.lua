-- A picture that a cell makes is described to those who cannot see it by the paragraph before the cell,
-- which says what to look for.
local before = ""

return {{
  traverse = "topdown",
  Header = function(header) before = pandoc.utils.stringify(header) end,
  Para = function(para)
    local text = pandoc.utils.stringify(para)
    if text ~= "" then before = text end
  end,
  Image = function(image)
    if #image.caption == 0 and not image.attributes["fig-alt"] then
      image.attributes["fig-alt"] = before
      return image
    end
  end,
}}
