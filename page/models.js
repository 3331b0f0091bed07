// The models that `make page` lays beside the page, and images that show what each of them knows.

export const MODELS = [
  {
    name: "one-d-piece_emoji",
    label: "Emoji",
    knows: "emoji on white, in colour",
    examples: "examples/emoji/",
    images: ["smiley", "police_car", "pizza", "lantern", "flag", "dolphin", "letter", "person", "teddy_bear"],
  },
  {
    name: "one-d-piece_fashion",
    label: "Garments",
    knows: "grey garments on black",
    examples: "examples/fashion/",
    images: ["sneaker", "ankle_boot", "bag", "coat", "dress", "pullover", "sandal", "shirt", "t-shirt", "trouser"],
  },
];
