# Reads a NoCloud seed (meta-data, then user-data) and writes shell calls of seed_* functions.
#
# Of both, these keys at the left margin (meta-data has the mounts that lumed itself adds):
#   local-hostname:
#   mounts:    lists of source, path, type, options; in one pair of brackets or one item a line
#   runcmd:    strings, or lists of the words of a command
#   password:  of the user lume; chpasswd and users: likewise, by the first of the keys password,
#              plain_text_passwd, passwd or hashed_passwd found under them
# A string may be bare, in 'single' or in "double" quotes, and stands on one line; a pair of
# brackets may go on over lines. Everything else is passed over.

function quoted(text) {
    gsub(/'/, "'\\''", text)
    return "'" text "'"
}

# One YAML scalar without its quotes and their escapes.
function scalar(text) {
    gsub(/^[ \t]+|[ \t\r]+$/, "", text)
    if (text ~ /^".*"$/) {
        text = substr(text, 2, length(text) - 2)
        gsub(/\\\\/, "\001", text)
        gsub(/\\"/, "\"", text)
        gsub(/\\n/, "\n", text)
        gsub(/\\t/, "\t", text)
        gsub(/\001/, "\\", text)
    } else if (text ~ /^'.*'$/) {
        text = substr(text, 2, length(text) - 2)
        gsub(/''/, "'", text)
    } else {
        sub(/[ \t]+#.*$/, "", text)
    }
    return text
}

function add_word(text) {
    words[++count] = scalar(text)
}

# The words of [a, "b,c", 'd']; commas and brackets inside quotes are text.
function split_brackets(text, position, letter, quote, word) {
    word = quote = ""
    for (position = 2; position <= length(text); position++) {
        letter = substr(text, position, 1)
        if (quote != "") {
            if (letter == "\\" && quote == "\"") {
                word = word letter
                letter = substr(text, ++position, 1)
            } else if (letter == quote) {
                quote = ""
            }
        } else if (letter == "\"" || letter == "'") {
            quote = letter
        } else if (letter == "," || letter == "]") {
            if (word !~ /^[ \t]*$/) add_word(word)
            word = ""
            if (letter == "]") return 1
            continue
        }
        word = word letter
    }
    return 0
}

# The item read so far is complete: write it.
function flush_item(number, command) {
    if (count && section == "mounts" && count >= 2)
        print "seed_mount " quoted(words[1]) " " quoted(words[2]) " " \
            quoted(count >= 3 ? words[3] : "auto") " " quoted(count >= 4 ? words[4] : "")
    if (count && section == "runcmd") {
        command = words[1]
        if (is_list) {
            command = quoted(words[1])
            for (number = 2; number <= count; number++) command = command " " quoted(words[number])
        }
        print "seed_run " quoted(command)
    }
    count = is_list = 0
}

function set_password(line) {
    if (password_set) return
    password_set = 1
    if (line ~ /^[ \t-]*(passwd|hashed_passwd):/ || line ~ /:[ \t]*["']?\$[0-9a-z]+\$/)
        option = " -e"
    sub(/^[^:]*:/, "", line)
    print "seed_password " quoted(scalar(line)) option
}

/^[ \t]*(#|$)/ { next }

pending != "" {
    pending = pending " " $0
    count = 0
    if (split_brackets(pending)) { pending = ""; flush_item() }
    next
}

/^[A-Za-z_-]+:/ {
    flush_item()
    section = $0
    sub(/:.*/, "", section)
    if (section == "password") set_password($0)
    if (section == "local-hostname") {
        sub(/^[^:]*:/, "")
        print "seed_hostname " quoted(scalar($0))
    }
    next
}

section ~ /^(users|chpasswd)$/ && /^[ \t-]*(password|passwd|plain_text_passwd|hashed_passwd):/ {
    set_password($0)
    next
}

section !~ /^(mounts|runcmd)$/ { next }

{
    match($0, /^ */)
    indent = RLENGTH
    line = substr($0, indent + 1)
    if (count && is_list && indent > item_indent && line ~ /^- /) {
        add_word(substr(line, 3))
        next
    }
    if (line !~ /^- /) next
    flush_item()
    item_indent = indent
    line = substr(line, 3)
    sub(/^ +/, "", line)
    if (line ~ /^\[/) {
        is_list = 1
        if (split_brackets(line)) flush_item()
        else pending = line
    } else if (line ~ /^- /) {
        is_list = 1
        add_word(substr(line, 3))
    } else {
        add_word(line)
        flush_item()
    }
}

END { flush_item() }
