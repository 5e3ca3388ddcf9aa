// Replays recorded steps of the native library, so that sanitizers can watch it without Python: replay FILE INSTRUCTION_SET THREADS.
//
// The file (tests/native_recording.py writes it) is a list of byte sections and of places in them that must point to other sections.
// Every section gets memory of its own size, so that an access beyond it is seen. Exit code 0 where all logits are as recorded, bit by bit.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "abi.h"

namespace {

template <class T>
T read_one(FILE* file) {
  T value;
  if (fread(&value, sizeof(T), 1, file) != 1) {
    fprintf(stderr, "the recording ends too early\n");
    exit(2);
  }
  return value;
}

struct Section {
  char* memory;
  int64_t size;
};

Section new_section(int64_t size) {
  const size_t room = (size_t)((size + 63) / 64 * 64);
  return {(char*)aligned_alloc(64, room == 0 ? 64 : room), size};
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    fprintf(stderr, "replay FILE INSTRUCTION_SET THREADS\n");
    return 2;
  }
  FILE* file = fopen(arguments[1], "rb");
  if (file == nullptr) {
    fprintf(stderr, "%s cannot be opened\n", arguments[1]);
    return 2;
  }
  const int64_t num_pages = read_one<int64_t>(file), num_layers = read_one<int64_t>(file), num_steps = read_one<int64_t>(file);
  std::vector<Section> sections((size_t)read_one<int64_t>(file));
  for (Section& section : sections) {
    section = new_section(read_one<int64_t>(file));
    if (fread(section.memory, 1, (size_t)section.size, file) != (size_t)section.size) return 2;
  }
  for (int64_t left = read_one<int64_t>(file); left > 0; left--) {
    const int64_t from = read_one<int64_t>(file), offset = read_one<int64_t>(file), to = read_one<int64_t>(file);
    memcpy(sections[(size_t)from].memory + offset, &sections[(size_t)to].memory, sizeof(char*));
  }
  const MoaModel* model = (const MoaModel*)sections[0].memory;
  int64_t key_bytes, value_bytes;
  moa_page_bytes(model, &key_bytes, &value_bytes);
  Section keys = new_section(num_layers * num_pages * key_bytes), values = new_section(num_layers * num_pages * value_bytes);
  MoaEngine* engine = moa_engine_new(model, arguments[2], atoi(arguments[3]), keys.memory, values.memory, num_pages);
  if (engine == nullptr) {
    fprintf(stderr, "no engine for %s\n", arguments[2]);
    return 2;
  }
  int wrong = 0;
  for (int64_t step = 0; step < num_steps; step++) {
    const Section &batch = sections[(size_t)(1 + 2 * step)], &expected = sections[(size_t)(2 + 2 * step)];
    if (moa_engine_step(engine, (const MoaBatch*)batch.memory) != 0) return 2;
    const float* logits = ((const MoaBatch*)batch.memory)->logits;
    if (expected.size != 0 && memcmp(logits, expected.memory, (size_t)expected.size) != 0) {
      fprintf(stderr, "step %d: other logits than recorded\n", (int)step);
      wrong = 1;
    }
  }
  moa_engine_delete(engine);
  for (Section& section : sections) free(section.memory);
  free(keys.memory);
  free(values.memory);
  fclose(file);
  return wrong;
}
