/* The records that say how a process is to be started: u8 key, u32 length, bytes. docs/agent.md lists the keys. */
#include "agent.h"

#define STRINGS_MOST 16384

/* A string, ended by a zero: moved to where the last byte of its length was, which has been read. */
static char *string(uint8_t *bytes, uint32_t length)
{
	char *text = (char *)bytes - 1;
	memcpy(text, bytes, length);
	text[length] = 0;
	return text;
}

static uint32_t u32(const uint8_t *at)
{
	uint32_t value;
	memcpy(&value, at, sizeof value);
	return value;
}

/* 0 where a record is none; the strings stay where they are, and are changed there. */
int parse(uint8_t *at, size_t size, struct spec *spec)
{
	static char *argv[STRINGS_MOST + 1], *env[STRINGS_MOST + 1];
	/* the lengths of records that have no other */
	static const struct {
		char key;
		uint8_t length;
	} lengths[] = { { 'u', 4 }, { 'g', 4 }, { 'G', 4 }, { 't', 4 }, { 'r', 20 }, { 'C', 40 }, { 'n', 0 }, { 'm', 4 }, { 'o', 4 } };
	unsigned arguments = 0, variables = 0;
	uint8_t *end = at + size;
	memset(spec, 0, sizeof *spec);
	spec->argv = argv;
	spec->env = env;
	while (at < end) {
		if (end - at < 5)
			return 0;
		char key = *at;
		uint32_t length = u32(at + 1);
		uint8_t *bytes = at + 5;
		if (length > (size_t)(end - bytes))
			return 0;
		at = bytes + length;
		for (unsigned n = 0; n < sizeof lengths / sizeof *lengths; n++)
			if (key == lengths[n].key && length != lengths[n].length)
				return 0;
		switch (key) {
		case 'a':
		case 'e':
			if (arguments + variables == STRINGS_MOST)
				return 0;
			*(key == 'a' ? &argv[arguments++] : &env[variables++]) = string(bytes, length);
			break;
		case 'p':
			spec->program = string(bytes, length);
			break;
		case 'c':
			spec->cwd = string(bytes, length);
			break;
		case 'u':
			spec->uid = u32(bytes);
			break;
		case 'g':
			spec->gid = u32(bytes);
			break;
		case 'G':
			if (spec->group_count == sizeof spec->groups / sizeof *spec->groups)
				return 0;
			spec->groups[spec->group_count++] = u32(bytes);
			break;
		case 't':
			spec->has_terminal = 1;
			memcpy(&spec->rows, bytes, 2);
			memcpy(&spec->columns, bytes + 2, 2);
			break;
		case 'r':
			if (spec->limit_count == sizeof spec->limits / sizeof *spec->limits)
				return 0;
			spec->limits[spec->limit_count++] = bytes;
			break;
		case 'C':
			spec->has_capabilities = 1;
			memcpy(spec->capabilities, bytes, sizeof spec->capabilities);
			break;
		case 'n':
			spec->no_new_privs = 1;
			break;
		case 'm':
			spec->has_umask = 1;
			spec->umask = u32(bytes);
			break;
		case 'o':
			spec->has_oom_score_adj = 1;
			spec->oom_score_adj = u32(bytes);
			break;
		default:
			return 0;
		}
	}
	argv[arguments] = env[variables] = 0;
	return arguments > 0;
}
