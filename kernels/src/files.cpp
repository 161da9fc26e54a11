// Tensors that lie in files: read when they are evaluated, several into one where rows are joined.
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "on_cpu.h"

namespace mlk::graph {

namespace {

constexpr size_t PIECE = 2 << 20;  // bytes that a thread reads at once: a huge page

// What tells a file from another one, and from itself after a change.
struct Stamp {
  dev_t device;
  ino_t number;
  off_t size;
  time_t seconds;
  long nanoseconds;
  bool operator==(const Stamp&) const = default;
};

struct Part {
  std::string path;
  size_t offset, nbytes;
  Stamp stamp;
  bool operator==(const Part&) const = default;
};

class File {
 public:
  explicit File(const std::string& path) : path_(path), handle_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (handle_ < 0) fail(std::strerror(errno));
  }
  File(const std::string& path, const Stamp& expected) : File(path) {
    if (!(stamp() == expected)) fail("it has changed since it was opened");
  }
  ~File() { close(handle_); }
  File(const File&) = delete;

  Stamp stamp() const {
    struct stat found;
    if (fstat(handle_, &found)) fail(std::strerror(errno));
    return {found.st_dev, found.st_ino, found.st_size, found.st_mtim.tv_sec, found.st_mtim.tv_nsec};
  }

  void read(size_t offset, size_t nbytes, char* to) const {
    while (nbytes) {
      ssize_t found = pread(handle_, to, nbytes, off_t(offset));
      if (found < 0 && errno == EINTR) continue;
      if (found < 0) fail(std::strerror(errno));
      if (found == 0) fail("it is cut short: it has changed since it was opened");
      offset += found, to += found, nbytes -= found;
    }
  }

 private:
  [[noreturn]] void fail(const char* reason) const {
    throw std::runtime_error(path_ + ": cannot be read: " + reason);
  }

  std::string path_;
  int handle_;
};

// Memory that is filled once costs less to fill than its page faults do. Only asked for: the answer
// does not matter.
void want_huge_pages(char* memory, size_t nbytes) {
#ifdef MADV_HUGEPAGE
  size_t page = size_t(sysconf(_SC_PAGESIZE)), first = (size_t(memory) + page - 1) / page * page;
  size_t last = (size_t(memory) + nbytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Reads at once, on the caller's thread and the pool's: what fails is thrown where the evaluation was
// asked for, and the interpreter is free meanwhile.
class FileRows : public mx::UnaryPrimitive {
 public:
  FileRows(mx::Stream stream, std::vector<Part> parts)
      : UnaryPrimitive(stream), parts_(std::move(parts)) {}
  const char* name() const override { return "MlxLlamaFileRows"; }
  bool is_equivalent(const Primitive& other) const override {
    return parts_ == dynamic_cast<const FileRows&>(other).parts_;
  }
  const std::vector<Part>& parts() const { return parts_; }

  void eval_cpu(const std::vector<array>&, array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    char* to = out.data<char>();
    if (out.nbytes() >= PIECE) want_huge_pages(to, out.nbytes());
    for (const Part& part : parts_) {
      File file(part.path, part.stamp);
      Pool::shared().each(part.nbytes, PIECE, [&](size_t first, size_t last, size_t) {
        file.read(part.offset + first, last - first, to + first);
      });
      to += part.nbytes;
    }
  }

  void eval_gpu(const std::vector<array>&, array&) override {
    throw std::runtime_error("these kernels run on a CPU alone");
  }

 private:
  std::vector<Part> parts_;
};

const FileRows* unread(const array& a) {
  if (a.status() != array::Status::unscheduled || !a.has_primitive()) return nullptr;
  return dynamic_cast<const FileRows*>(&a.primitive());
}

array rows_of_files(mx::Shape shape, mx::Dtype dtype, std::vector<Part> parts) {
  return array(std::move(shape), dtype, std::make_shared<FileRows>(cpu(), std::move(parts)),
               std::vector<array>{});
}

}  // namespace

array file_array(const std::string& path, size_t offset, const std::vector<int>& shape, mx::Dtype dtype) {
  size_t nbytes = dtype.size();
  for (int n : shape) {
    if (n < 0) refuse("shape: found ", n, ", expected 0 or more");
    nbytes *= size_t(n);
  }
  std::vector<Part> parts{{path, offset, nbytes, File(path).stamp()}};
  return rows_of_files(mx::Shape(shape.begin(), shape.end()), dtype, std::move(parts));
}

array join_rows(const std::vector<array>& arrays) {
  if (arrays.empty()) refuse("arrays: found none, expected one at least");
  std::vector<Part> parts;
  mx::Shape shape;
  for (const array& a : arrays) {
    const FileRows* rows = a.ndim() ? unread(a) : nullptr;
    bool fits = rows && a.dtype() == arrays[0].dtype() && a.ndim() == arrays[0].ndim() &&
                std::equal(a.shape().begin() + 1, a.shape().end(), arrays[0].shape().begin() + 1);
    if (!fits) return mx::concatenate(arrays, 0);
    int before = shape.empty() ? 0 : shape[0];
    shape = a.shape();
    shape[0] += before;
    parts.insert(parts.end(), rows->parts().begin(), rows->parts().end());
  }
  return rows_of_files(std::move(shape), arrays.at(0).dtype(), std::move(parts));
}

}  // namespace mlk::graph
