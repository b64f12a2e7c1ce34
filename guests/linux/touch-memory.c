/* touch-memory MIB [SECONDS]: use so much memory, say so, keep it for so long. For tests of the balloon. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int count, char **words)
{
	size_t size = (count > 1 ? strtoul(words[1], NULL, 0) : 0) << 20;
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (!size || memory == MAP_FAILED)
		return 1;
	for (size_t at = 0; at < size; at += 4096)
		memory[at] = (char)(at >> 12) | 1;
	for (size_t at = 0; at < size; at += 4096)
		if (memory[at] != ((char)(at >> 12) | 1)) {
			puts("memory changed");
			return 1;
		}
	printf("touched %zu MiB\n", size >> 20);
	fflush(stdout);
	sleep(count > 2 ? atoi(words[2]) : 0);
	return 0;
}
